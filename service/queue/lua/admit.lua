-- flags:
-- needs: backlog place rate room
-- Accept a job, or say why not; nothing is reserved unless all of it is. Sent twice, it answers twice the same.
-- ARGV: id model request key class cost timeout_ms keep_ms watch_ms trace max_jobs max_cost alive_ms idempotency sha
--       who weight jobs_per_minute cost_per_minute max_jobs_of_key
local id, model, request, key, class = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local cost, timeout, keep, watch = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local now = now_ms()

local known, sha = id, nil
if ARGV[14] ~= '' then
  local kept = redis.call('GET', IDEMPOTENCY .. ARGV[14])
  if kept then
    known, sha = string.match(kept, '^(%S+) (%S+)$')
  end
end
if redis.call('EXISTS', JOB .. known) == 1 then
  if sha and sha ~= ARGV[15] then
    return { 'conflict', known }
  end
  return { known == id and 'admitted' or 'known', known, place(known, model, class) }
end

if redis.call('ZCOUNT', SERVED .. model, now - ARGV[13], '+inf') == 0 then
  return { 'no_worker' }
end
local wait, levels = rate_of(key, { ARGV[18], ARGV[19] }, { 1, cost }, now)
if wait > 0 then
  return { 'rate', wait }
end
local counts = counts_of(model, key)
if ARGV[20] ~= '' and counts.of_key >= tonumber(ARGV[20]) then
  return { 'key_full', counts.of_key, cost / math.max(1, counts.speed) * 1000 }
end
wait = no_room(model, ARGV[16], cost, counts, tonumber(ARGV[11]), tonumber(ARGV[12]), now)
if wait then
  return { 'full', counts.queued, counts.queued_cost, math.ceil(wait) }
end

spend(key, levels, now)
local deadline, expires, owed = now + timeout, now + timeout + keep, cost / ARGV[17]
redis.call('HSET', JOB .. id, 'state', 'queued', 'model', model, 'request', request, 'key', key, 'class', class,
  'cost', cost, 'owed', owed, 'n', 0, 'chars', 0, 'attempt', 0, 'lost', 0, 'created', now, 'deadline', deadline,
  'expires', expires, 'keep', keep, 'watched', watch > 0 and 1 or 0, 'trace', ARGV[10])
redis.call('PEXPIREAT', JOB .. id, expires)
join_backlog(id, model, class, key, cost, owed, expires)
redis.call('ZADD', DEADLINES, deadline, id)
redis.call('ZADD', MODELS, now, model)
if watch > 0 then redis.call('ZADD', WATCHES, now + watch, id) end
for _, shared in ipairs({ DEADLINES, MODELS, WATCHES }) do live_until(shared, expires) end
if ARGV[14] ~= '' then redis.call('SET', IDEMPOTENCY .. ARGV[14], id .. ' ' .. ARGV[15], 'PXAT', expires) end
redis.call('LPUSH', BELL .. model, 1)
redis.call('LTRIM', BELL .. model, 0, 63)
redis.call('PEXPIRE', BELL .. model, 60000)
return { 'admitted', id, place(id, model, class) }
