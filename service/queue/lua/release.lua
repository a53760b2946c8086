-- flags: allow-oom
-- needs: backlog close fence
-- Hand running jobs over (SIGTERM): claimable at once, nobody's loss. The attempt moves on, which fences late writes.
-- ARGV per job: id attempt
local now, answers = now_ms(), {}
for i = 1, #ARGV, 2 do
  local id = ARGV[i]
  local job, verdict = fenced(id, ARGV[i + 1], now)
  if job then
    redis.call('HINCRBY', JOB .. id, 'attempt', 1)
    redis.call('ZADD', LEASES .. job[6], 'XX', 0, id)
    redis.call('LPUSH', BELL .. job[6], 1)
    redis.call('PEXPIRE', BELL .. job[6], 60000)
  end
  answers[#answers + 1] = verdict or 'ok'
end
return answers
