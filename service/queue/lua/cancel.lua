-- flags: allow-oom
-- needs: backlog close
-- Close a queued or running job; one that ended stays as it is. Answers whether the job is known.
-- ARGV: id
local state = redis.call('HGET', JOB .. ARGV[1], 'state')
if state == 'queued' or state == 'running' then
  close(ARGV[1], 'cancelled', 'cancelled', now_ms())
end
return state and 1 or 0
