-- Take a job out of its line. An empty line forgets its virtual times: nobody owes anybody anything.
local function leave_backlog(id, model, class)
  local line = BACKLOG .. model .. ':' .. class
  redis.call('ZREM', line, id)
  if redis.call('EXISTS', line) == 0 then
    redis.call('DEL', SHARE .. model .. ':' .. class)
  end
end

local function count(model, state, jobs, cost)
  redis.call('HINCRBY', COUNTS .. model, state, jobs)
  redis.call('HINCRBY', COUNTS .. model, state .. '_cost', jobs * cost)
end
