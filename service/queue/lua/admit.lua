-- flags:
-- needs: place
-- Accept a job, or say why not; nothing is reserved unless all of it is. Sent twice, it answers twice the same.
-- ARGV: id model request key class cost timeout_ms keep_ms watch_ms trace max_jobs max_cost alive_ms idempotency sha
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
local counts = redis.call('HMGET', COUNTS .. model, 'queued', 'queued_cost', 'speed')
local queued, queued_cost = tonumber(counts[1] or 0), tonumber(counts[2] or 0)
if queued + 1 > tonumber(ARGV[11]) or queued_cost + cost > tonumber(ARGV[12]) then
  return { 'full', tostring(queued), tostring(queued_cost), counts[3] or '0' }
end

local deadline, expires = now + timeout, now + timeout + keep
redis.call('HSET', JOB .. id, 'state', 'queued', 'model', model, 'request', request, 'key', key, 'class', class,
  'cost', cost, 'n', 0, 'chars', 0, 'attempt', 0, 'lost', 0, 'created', now, 'deadline', deadline,
  'expires', expires, 'keep', keep, 'watched', watch > 0 and 1 or 0, 'trace', ARGV[10])
redis.call('PEXPIREAT', JOB .. id, expires)

local line, share = BACKLOG .. model .. ':' .. class, SHARE .. model .. ':' .. class
local times = redis.call('HMGET', share, 'v', 'k:' .. key)
local tag = math.max(tonumber(times[1] or 0), tonumber(times[2] or 0)) + cost
redis.call('HSET', share, 'k:' .. key, tag)
redis.call('ZADD', line, tag, id)
redis.call('HINCRBY', COUNTS .. model, 'queued', 1)
redis.call('HINCRBY', COUNTS .. model, 'queued_cost', cost)
redis.call('ZADD', DEADLINES, deadline, id)
redis.call('ZADD', MODELS, now, model)
if watch > 0 then redis.call('ZADD', WATCHES, now + watch, id) end
for _, shared in ipairs({ line, share, COUNTS .. model, DEADLINES, MODELS, WATCHES }) do live_until(shared, expires) end
if ARGV[14] ~= '' then redis.call('SET', IDEMPOTENCY .. ARGV[14], id .. ' ' .. ARGV[15], 'PXAT', expires) end
redis.call('LPUSH', BELL .. model, 1)
redis.call('LTRIM', BELL .. model, 0, 63)
redis.call('PEXPIRE', BELL .. model, 60000)
return { 'admitted', id, place(id, model, class) }
