-- flags: allow-oom
-- needs: backlog close fence
-- Deliver tokens of several jobs and renew their leases. Answers per chunk, flat: verdict, index, number of readers.
-- ARGV: lease_ms, then per chunk: id attempt first last length chunk
local lease_ms, now, answers = tonumber(ARGV[1]), now_ms(), {}
for i = 2, #ARGV, 6 do
  local id = ARGV[i]
  local index, num_readers = 0, -1
  local job, verdict = fenced(id, ARGV[i + 1], now)
  if job then
    local first, last = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
    verdict, index, num_readers = write_chunk(id, job, first, last, ARGV[i + 4], ARGV[i + 5], now)
    redis.call('ZADD', LEASES .. job[6], 'XX', now + lease_ms, id)
  end
  answers[#answers + 1] = verdict
  answers[#answers + 1] = index
  answers[#answers + 1] = num_readers
end
return answers
