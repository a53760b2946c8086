-- flags: no-writes
-- needs: place
-- A whole job at one instant: {fields, place, entries}; nothing for an unknown job.
-- ARGV: id
local fields = redis.call('HGETALL', JOB .. ARGV[1])
if #fields == 0 then
  return {}
end
local job = redis.call('HMGET', JOB .. ARGV[1], 'state', 'model', 'class')
local standing = job[1] == 'queued' and place(ARGV[1], job[2], job[3]) or {}
return { fields, standing, redis.call('XRANGE', TOKENS .. ARGV[1], '-', '+') }
