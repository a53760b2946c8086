-- End a queued or running job: take it from where it is, give back what it held, tell its readers and its worker.
-- Every ending goes through here. `details` are further fields of the hash; `tail` is text that no token carries.
local function close(id, state, reason, now, details, tail)
  local key, stream = JOB .. id, TOKENS .. id
  local job = redis.call('HMGET', key, 'state', 'model', 'class', 'cost', 'key', 'n', 'chars', 'keep', 'owed')
  local was, model, class, cost, n, keep = job[1], job[2], job[3], job[4], job[6], job[8]
  if was == 'queued' then
    local share = SHARE .. model .. ':' .. class
    if redis.call('HEXISTS', share, 'k:' .. job[5]) == 1 then
      redis.call('HINCRBYFLOAT', share, 'k:' .. job[5], -job[9]) -- what was not served is not owed
    end
    for name, amount in pairs({ jobs = 1, cost = cost }) do -- nor does it count as asked for
      if redis.call('HEXISTS', RATE .. job[5], name) == 1 then
        redis.call('HINCRBYFLOAT', RATE .. job[5], name, amount)
      end
    end
    leave_backlog(id, model, class)
    no_longer_queued(model, job[5], cost)
  else
    redis.call('ZREM', LEASES .. model, id)
    count(model, 'running', -1, cost)
    count_of_key(model, 'r:' .. job[5], -1)
    if reason == 'cancelled' or reason == 'deadline' then
      redis.call('XADD', CANCELLED, 'MAXLEN', '~', 10000, '*', 'j', id)
      redis.call('PEXPIRE', CANCELLED, 60000)
    end
  end
  redis.call('ZREM', DEADLINES, id)
  redis.call('ZREM', WATCHES, id)
  redis.call('HSET', key, 'state', state, 'reason', reason, 'finished', now, unpack(details or {}))
  if tail then
    redis.call('XADD', stream, (n + 1) .. '-0', 'e', state, 'c', tail, 'o', job[7])
    redis.call('PUBLISH', PUSH .. id, job[7] .. tail)
  else
    redis.call('XADD', stream, (n + 1) .. '-0', 'e', state)
  end
  redis.call('PUBLISH', PUSH .. id, 'end')
  redis.call('PUBLISH', END .. id, 'end')
  redis.call('PEXPIRE', key, keep)
  redis.call('PEXPIRE', stream, keep)
end
