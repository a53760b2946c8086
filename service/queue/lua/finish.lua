-- flags: allow-oom
-- needs: backlog close fence
-- End several jobs with their last chunk in one step, so that no ending is ever seen without its text.
-- ARGV per job: id attempt first last length chunk state reason stop_sequence error code prefill_ms cached_tokens
local now, answers = now_ms(), {}

-- Cost served per second: this job's own rate times the jobs that ran beside it (Little's law). Those that end in this
-- same step ran beside it too, so they are counted before the first of them is closed. What one stream gets through
-- says little of what all slots do together: once measured while somebody waited, which is at full speed, only such
-- samples count. Their mean reaches back half a minute, so that a bad second does not give bad turns.
local MEMORY_MS, beside = 30000, {}
local function measure(id, model)
  local job = redis.call('HMGET', JOB .. id, 'cost', 'leased')
  local fields = redis.call('HMGET', COUNTS .. model, 'running', 'queued', 'speed', 'samples', 'measured')
  local speed, samples = tonumber(fields[3] or 0), tonumber(fields[4] or 0)
  beside[model] = beside[model] or fields[1]
  local sample = job[1] * 1000 / math.max(1, now - job[2]) * beside[model]
  if tonumber(fields[2] or 0) > 0 then
    samples = samples * math.exp(((fields[5] or now) - now) / MEMORY_MS) + 1
    speed = speed + (sample - speed) / samples
    redis.call('HSET', COUNTS .. model, 'speed', speed, 'samples', samples, 'measured', now)
  elseif samples == 0 then
    redis.call('HSET', COUNTS .. model, 'speed', speed > 0 and 0.8 * speed + 0.2 * sample or sample)
  end
end

for i = 1, #ARGV, 13 do
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
      local details = { 'stop_sequence', ARGV[i + 8], 'error', ARGV[i + 9], 'code', ARGV[i + 10],
        'prefill_ms', ARGV[i + 11], 'cached_tokens', ARGV[i + 12] }
      close(id, state, ARGV[i + 7], now, details, tail)
    end
  end
  answers[#answers + 1] = verdict
  answers[#answers + 1] = index
end
return answers
