-- Is there room in the line? Who is refused gets a turn: a time to come back, one job's worth of the measured speed
-- behind the turn given before. A turn is a place in time, not a seat: a seat kept empty for somebody who is still on
-- the way is a slot that idles later. What a turn is worth: while there are any, newcomers leave a quarter of the line
-- free, and for those whose turn has come the line may be twice as long. So who obeys `Retry-After` finds room,
-- who hammers does not take it, and whoever is there is served.
local GRACE_MS, EARLY_MS, MOST_MS, MOST_PROMISES = 10000, 250, 600000, 20000

-- Returns nil when the job fits, else the milliseconds until it should be tried again (0: the speed is unknown).
local function no_room(model, who, cost, counts, max_jobs, max_cost, now)
  local promises = PROMISES .. model
  redis.call('ZREMRANGEBYSCORE', promises, '-inf', now - GRACE_MS)
  local due = tonumber(redis.call('ZSCORE', promises, who) or 0)
  local returns = due > 0 and due <= now + EARLY_MS
  local num_promises = redis.call('ZCARD', promises)
  local newcomers_jobs, newcomers_cost = max_jobs - math.floor(max_jobs / 4), max_cost * 0.75
  local most_jobs, most_cost = max_jobs, max_cost
  if returns then
    most_jobs, most_cost = 2 * max_jobs, 2 * max_cost
  elseif num_promises > 0 then
    most_jobs, most_cost = newcomers_jobs, newcomers_cost
  end
  if counts.queued + 1 <= most_jobs and counts.queued_cost + cost <= most_cost then
    redis.call('ZREM', promises, who)
    return nil
  end
  if due > now + EARLY_MS then
    return due - now -- it came too early; its turn stands
  end
  if counts.speed <= 0 then
    return 0
  end
  local apart, line = cost / counts.speed * 1000, 'promised'
  -- The first turn comes when as much was served as leaves newcomers their part of the line.
  local ahead = math.max(counts.queued - newcomers_jobs, (counts.queued_cost + cost - newcomers_cost) / cost, 0)
  if returns then -- its promise was broken, the service is slower than it was: such have a line of their own
    line, ahead = 'broken', 0
  end
  local next_due = math.max(now + ahead * apart, counts[line]) + apart
  if next_due - now <= MOST_MS and num_promises < MOST_PROMISES then
    redis.call('ZADD', promises, next_due, who)
    redis.call('PEXPIRE', promises, MOST_MS + GRACE_MS)
    redis.call('HSET', COUNTS .. model, line, math.ceil(next_due))
  end
  return math.min(next_due - now, MOST_MS)
end
