-- flags: allow-oom
-- needs: backlog close fence
-- Renew leases; a job that another attempt holds is never taken back. Answers one verdict per job.
-- ARGV: lease_ms, then per job: id attempt
local now, answers = now_ms(), {}
for i = 2, #ARGV, 2 do
  local job, verdict = fenced(ARGV[i], ARGV[i + 1], now)
  if job then
    redis.call('ZADD', LEASES .. job[6], 'XX', now + ARGV[1], ARGV[i])
  end
  answers[#answers + 1] = verdict or 'ok'
end
return answers
