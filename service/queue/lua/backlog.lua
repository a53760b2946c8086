-- The lines of waiting jobs, and the counters that go with them.
local function count(model, state, jobs, cost)
  redis.call('HINCRBY', COUNTS .. model, state, jobs)
  redis.call('HINCRBY', COUNTS .. model, state .. '_cost', jobs * cost)
end

local function count_of_key(model, field, jobs)
  if redis.call('HINCRBY', COUNTS .. model, field, jobs) <= 0 then
    redis.call('HDEL', COUNTS .. model, field)
  end
end

local function counts_of(model, key)
  local names, counts = { 'queued', 'queued_cost', 'speed', 'promised', 'broken' }, {}
  local fields = redis.call('HMGET', COUNTS .. model, 'k:' .. key, unpack(names))
  for i, name in ipairs(names) do counts[name] = tonumber(fields[i + 1] or 0) end
  counts.of_key = tonumber(fields[1] or 0)
  return counts
end

-- `owed` is the cost by the weight of the key, which is what its next jobs stand behind.
local function join_backlog(id, model, class, key, cost, owed, expires)
  local line, share = BACKLOG .. model .. ':' .. class, SHARE .. model .. ':' .. class
  local times = redis.call('HMGET', share, 'v', 'k:' .. key)
  local tag = math.max(tonumber(times[1] or 0), tonumber(times[2] or 0)) + owed
  redis.call('HSET', share, 'k:' .. key, tag)
  redis.call('ZADD', line, tag, id)
  count(model, 'queued', 1, cost)
  count_of_key(model, 'k:' .. key, 1)
  for _, shared in ipairs({ line, share, COUNTS .. model }) do live_until(shared, expires) end
end

-- An empty line forgets its virtual times: nobody owes anybody anything.
local function leave_backlog(id, model, class)
  local line = BACKLOG .. model .. ':' .. class
  redis.call('ZREM', line, id)
  if redis.call('EXISTS', line) == 0 then
    redis.call('DEL', SHARE .. model .. ':' .. class)
  end
end

local function no_longer_queued(model, key, cost)
  count(model, 'queued', -1, cost)
  count_of_key(model, 'k:' .. key, -1)
end
