-- flags: no-writes
-- needs: place
-- What a reader behind `cursor` has not seen: {state, place, entries}; of an ended job {state, fields, all entries};
-- nothing for an unknown job.
-- ARGV: id cursor
local job = redis.call('HMGET', JOB .. ARGV[1], 'state', 'model', 'class')
local state, stream = job[1], TOKENS .. ARGV[1]
if not state then
  return {}
end
if state == 'queued' or state == 'running' then
  local standing = state == 'queued' and place(ARGV[1], job[2], job[3]) or {}
  return { state, standing, redis.call('XRANGE', stream, '(' .. ARGV[2] .. '-0', '+') }
end
return { state, redis.call('HGETALL', JOB .. ARGV[1]), redis.call('XRANGE', stream, '-', '+') }
