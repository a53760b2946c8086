-- flags: allow-oom
-- Somebody still listens to these jobs. A job that asked for no watching has no entry and gets none.
-- ARGV: watch_ms, then ids
local until_ms = now_ms() + ARGV[1]
for i = 2, #ARGV do
  redis.call('ZADD', WATCHES, 'XX', until_ms, ARGV[i])
end
return #ARGV - 1
