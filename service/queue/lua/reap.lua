-- flags: allow-oom
-- needs: backlog close
-- Close what nobody else closes: deadlines passed, listeners gone. Any process, about once a second.
-- Answers {closed, 1 when the audit should run}.
-- ARGV: watch_ms pause_ms
local now, closed, lost = now_ms(), 0, 0
local reaped_lately = redis.call('EXISTS', REAPED) == 1
redis.call('SET', REAPED, now, 'PX', ARGV[2])

local function due(key, state, reason)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, 200)) do
    if redis.call('HEXISTS', JOB .. id, 'state') == 1 then
      close(id, state, reason, now)
      closed = closed + 1
    else
      redis.call('ZREM', key, id)
      lost = 1
    end
  end
end

due(DEADLINES, 'expired', 'deadline')
if reaped_lately then
  due(WATCHES, 'cancelled', 'cancelled')
else
  -- Redis or every process was away: listeners could not say that they are there, so each gets its time again.
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', WATCHES, '-inf', now)) do
    redis.call('ZADD', WATCHES, 'XX', now + ARGV[1], id)
  end
end
return { closed, lost }
