-- flags: allow-oom
-- needs: backlog close lease orphans
-- Give a worker as many jobs as it has room for: first those whose worker fell silent, then the lines by class.
-- ARGV: worker model revision slots tokens lease_ms max_lost spare
local worker, model, revision, lease_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6])
local slots, now, taken = tonumber(ARGV[4]), now_ms(), {}
local room = take_orphans(taken, worker, model, revision, slots, tonumber(ARGV[5]), lease_ms, tonumber(ARGV[7]), now)

-- Jobs that began together end together, and who comes meanwhile would wait for that, however little their key asked
-- for: so a key with more than half of what runs leaves the last `spare` slots to others, if need be from behind it.
local spare, LOOK_BEHIND = tonumber(ARGV[8]), 16
local function may_have_a_spare_slot(id)
  local key = redis.call('HGET', JOB .. id, 'key')
  if not key or key == '' then return true end
  local running = redis.call('HMGET', COUNTS .. model, 'running', 'r:' .. key)
  return 2 * tonumber(running[2] or 0) <= tonumber(running[1] or 0)
end

-- Every eighth pick starts lower down, in turn, so that neither normal nor batch starves.
local orders = { [0] = { 1, 2, 0 }, [8] = { 2, 1, 0 } }
local function head_of_lines(is_spare)
  local picks = tonumber(redis.call('HGET', COUNTS .. model, 'picks') or 0)
  for _, class in ipairs(orders[(picks + 1) % 16] or { 0, 1, 2 }) do
    local line = redis.call('ZRANGE', BACKLOG .. model .. ':' .. class, 0, is_spare and LOOK_BEHIND or 0, 'WITHSCORES')
    for i = 1, #line, 2 do
      if not is_spare or may_have_a_spare_slot(line[i]) then
        return line[i], line[i + 1], class
      end
    end
  end
end

while #taken < slots do
  local is_spare = slots - #taken <= spare
  local id, tag, class = head_of_lines(is_spare)
  if not id then
    if not is_spare then redis.call('DEL', BELL .. model) end -- nothing is left to be woken for
    break
  end
  local job = redis.call('HMGET', JOB .. id, 'cost', 'deadline', 'key')
  if not job[1] then
    leave_backlog(id, model, class)
  elseif tonumber(job[2]) <= now then
    close(id, 'expired', 'deadline', now)
  elseif tonumber(job[1]) > room then
    break -- the head waits for room; passing it by would starve long prompts
  else
    room = room - job[1]
    redis.call('HSET', SHARE .. model .. ':' .. class, 'v', tag)
    leave_backlog(id, model, class)
    no_longer_queued(model, job[3], job[1])
    count(model, 'running', 1, job[1])
    count_of_key(model, 'r:' .. job[3], 1)
    redis.call('HINCRBY', COUNTS .. model, 'picks', 1)
    taken[#taken + 1] = lease(id, 1, worker, revision, now, lease_ms)
  end
end
return taken
