-- flags: allow-oom
-- A worker says that it lives, what it serves, and what it no longer serves.
-- ARGV: worker info ('' = it leaves) alive_ms, then per model: name 1|0
local worker, alive, now = ARGV[1], tonumber(ARGV[3]), now_ms()
if ARGV[2] == '' then
  redis.call('DEL', WORKER .. worker)
  redis.call('ZREM', WORKERS, worker)
else
  redis.call('SET', WORKER .. worker, ARGV[2], 'PX', alive)
  redis.call('ZADD', WORKERS, now, worker)
  redis.call('ZREMRANGEBYSCORE', WORKERS, '-inf', now - alive)
  redis.call('PEXPIRE', WORKERS, alive)
end
for i = 4, #ARGV, 2 do
  local served = SERVED .. ARGV[i]
  if ARGV[i + 1] == '1' then
    redis.call('ZADD', served, now, worker)
    redis.call('ZREMRANGEBYSCORE', served, '-inf', now - alive)
    redis.call('PEXPIRE', served, alive)
    redis.call('ZADD', MODELS, now, ARGV[i])
    live_until(MODELS, now + 3600000)
  else
    redis.call('ZREM', served, worker)
  end
end
return now
