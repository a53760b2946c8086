-- Give a job to a worker. Returns what the worker needs, with the chunks an earlier attempt delivered.
local function lease(id, attempt, worker, revision, now, lease_ms)
  local key = JOB .. id
  redis.call('HSET', key, 'state', 'running', 'worker', worker, 'attempt', attempt, 'revision', revision, 'leased', now)
  redis.call('HSETNX', key, 'started', now)
  local job = redis.call('HMGET', key, 'model', 'expires', 'n', 'request', 'trace')
  redis.call('ZADD', LEASES .. job[1], now + lease_ms, id)
  live_until(LEASES .. job[1], tonumber(job[2]))
  local chunks = {}
  if job[3] ~= '0' then
    chunks = redis.call('XRANGE', TOKENS .. id, '-', '+')
  end
  return { id, attempt, job[4], job[5], chunks }
end
