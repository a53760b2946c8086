-- May this attempt write? Returns the job's fields when it may, else nil and the verdict.
local function fenced(id, attempt, now)
  local job = redis.call('HMGET', JOB .. id, 'state', 'attempt', 'n', 'chars', 'deadline', 'model', 'expires')
  if job[2] ~= attempt then
    return nil, 'fenced'
  end
  if job[1] == 'running' then
    if tonumber(job[5]) > now then
      return job
    end
    close(id, 'expired', 'deadline', now)
    return nil, 'cancel'
  end
  if job[1] == 'cancelled' or job[1] == 'expired' then
    return nil, 'cancel'
  end
  return nil, 'fenced', job[1]
end

-- Add tokens [first, last) to a job that `fenced` returned; twice changes nothing. Answers verdict, index, and how many
-- readers it was published to, -1 where it was not.
local function write_chunk(id, job, first, last, length, chunk, now)
  local n = tonumber(job[3])
  if last <= n then
    return 'ok', n, -1
  end
  if first ~= n then
    return 'gap', n, -1
  end
  redis.call('XADD', TOKENS .. id, last .. '-0', 'c', chunk, 'o', job[4])
  local num_readers = redis.call('PUBLISH', PUSH .. id, job[4] .. chunk)
  redis.call('HSET', JOB .. id, 'n', last, 'chars', job[4] + length)
  if n == 0 then
    redis.call('HSETNX', JOB .. id, 'first_token', now)
    redis.call('PEXPIREAT', TOKENS .. id, job[7])
  end
  return 'ok', last, num_readers
end
