-- flags: allow-oom
-- needs: backlog close fence
-- End several jobs with their last chunk in one step, so that no ending is ever seen without its text.
-- ARGV per job: id attempt first last length chunk state reason stop_sequence error prefill_ms cached_tokens
local now, answers = now_ms(), {}

-- Cost served per second: this job's own rate times the jobs that ran beside it (Little's law), smoothed. Those that
-- end in this same step ran beside it too, so they are counted before the first of them is closed.
local beside = {}
local function measure(id, model)
  local job = redis.call('HMGET', JOB .. id, 'cost', 'leased')
  local counts = redis.call('HMGET', COUNTS .. model, 'running', 'speed')
  beside[model] = beside[model] or counts[1]
  local sample = job[1] * 1000 / math.max(1, now - job[2]) * beside[model]
  local speed = tonumber(counts[2] or 0)
  redis.call('HSET', COUNTS .. model, 'speed', speed > 0 and 0.8 * speed + 0.2 * sample or sample)
end

for i = 1, #ARGV, 12 do
  local id, state, index = ARGV[i], ARGV[i + 6], 0
  local job, verdict, already = fenced(id, ARGV[i + 1], now)
  if already == state then
    verdict = 'ok' -- sent twice
  end
  if job then
    local first, last, chunk = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), ARGV[i + 5]
    verdict, index = write_chunk(id, job, first, last, ARGV[i + 4], chunk, now)
    if verdict == 'ok' then
      if state == 'succeeded' and ARGV[i + 1] == '1' then measure(id, job[6]) end
      local tail = first == last and chunk ~= '' and chunk or nil
      local details = { 'stop_sequence', ARGV[i + 8], 'error', ARGV[i + 9], 'prefill_ms', ARGV[i + 10],
        'cached_tokens', ARGV[i + 11] }
      close(id, state, ARGV[i + 7], now, details, tail)
    end
  end
  answers[#answers + 1] = verdict
  answers[#answers + 1] = index
end
return answers
