-- Is there room in the line? Who is refused is told when to come back, and room is kept for it then: else whoever
-- asks at the right moment gets what somebody else was told to wait for, and obeying `Retry-After` is for fools.
-- Promises are as far apart as the service needs for one such job. Nobody has to come, so room is kept only for those
-- due within AHEAD_MS and for GRACE_MS after, never more than half of the line; and a quarter while anything is
-- promised at all, so that those who come a little early or late do not find it full.
local AHEAD_MS, GRACE_MS, EARLY_MS, MOST_MS, MOST_PROMISES = 2000, 4000, 250, 600000, 20000

-- Returns nil when the job fits, else the milliseconds until it should be tried again (0: the speed is unknown).
local function no_room(model, who, cost, counts, max_jobs, max_cost, now)
  local promises = PROMISES .. model
  redis.call('ZREMRANGEBYSCORE', promises, '-inf', now - GRACE_MS)
  local due = tonumber(redis.call('ZSCORE', promises, who) or 0)
  local returns = due > 0 and due <= now + EARLY_MS
  local num_promises, held, spare = redis.call('ZCARD', promises), 0, math.floor(max_jobs / 4)
  if num_promises > 0 and not returns then
    local num_due = redis.call('ZCOUNT', promises, '-inf', now + AHEAD_MS)
    held = math.max(spare, math.min(num_due, math.floor(max_jobs / 2)))
  end
  local held_cost = math.min(held * cost, max_cost / 2)
  if counts.queued + held + 1 <= max_jobs and counts.queued_cost + held_cost + cost <= max_cost then
    redis.call('ZREM', promises, who)
    return nil
  end
  if due > now + EARLY_MS then
    return due - now -- it came too early; its time stands
  end
  if counts.speed <= 0 then
    return 0
  end
  local apart = cost / counts.speed * 1000
  local line, first = 'promised', math.min(spare, counts.queued_cost / cost) * apart
  if returns then -- its promise was broken, the service is slower than it was: such have a line of their own
    line, first = 'broken', 0
  end
  local next_due = math.max(now + first, counts[line]) + apart
  if next_due - now <= MOST_MS and num_promises < MOST_PROMISES then
    redis.call('ZADD', promises, next_due, who)
    redis.call('PEXPIRE', promises, MOST_MS + GRACE_MS)
    redis.call('HSET', COUNTS .. model, line, math.ceil(next_due))
  end
  return math.min(next_due - now, MOST_MS)
end
