-- Give a worker the jobs whose worker fell silent or handed them over, oldest first, and close those beyond help.
-- `taken` receives the leases; returns the room that is left.
local function take_orphans(taken, worker, model, revision, slots, room, lease_ms, max_lost, now)
  local orphans = redis.call('ZRANGEBYSCORE', LEASES .. model, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 64)
  for i = 1, #orphans, 2 do
    local id, silent = orphans[i], orphans[i + 1] ~= '0' -- 0: handed over, which is nobody's loss
    local job = redis.call('HMGET', JOB .. id, 'attempt', 'lost', 'n', 'revision', 'cost', 'deadline')
    local lost = (job[2] or 0) + (silent and 1 or 0)
    if not job[1] then
      redis.call('ZREM', LEASES .. model, id)
    elseif tonumber(job[6]) <= now then
      close(id, 'expired', 'deadline', now)
    elseif lost >= max_lost then
      close(id, 'failed', 'error', now, { 'lost', lost, 'code', 'worker_lost' })
      redis.call('XADD', DEAD, 'MAXLEN', '~', 1000, '*', 'j', id, 'model', model, 'lost', lost)
      redis.call('PEXPIRE', DEAD, 86400000)
    elseif job[3] ~= '0' and job[4] ~= revision then
      close(id, 'failed', 'error', now, { 'code', 'model_changed' })
    elseif #taken < slots and tonumber(job[5]) > room then
      room = 0 -- it waits for room, and nothing passes it: newcomers would take what it waits for, for ever
    elseif #taken < slots then
      room = room - job[5]
      redis.call('HSET', JOB .. id, 'lost', lost)
      taken[#taken + 1] = lease(id, job[1] + (silent and 1 or 0), worker, revision, now, lease_ms)
    end
  end
  return room
end
