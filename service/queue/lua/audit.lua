-- flags: allow-oom
-- needs: backlog
-- Rebuild lines and counters from the jobs themselves; needed only when job hashes vanished (everything was down
-- for longer than results are kept, or somebody deleted keys). Answers how many references pointed nowhere.
local removed = 0

local function present(key, id)
  if redis.call('HEXISTS', JOB .. id, 'state') == 1 then
    return true
  end
  redis.call('ZREM', key, id)
  removed = removed + 1
  return false
end

local totals = {}
for _, model in ipairs(redis.call('ZRANGE', MODELS, 0, -1)) do
  totals[model] = { queued = 0, queued_cost = 0, running = 0, running_cost = 0, of_keys = {} }
  for class = 0, 2 do
    local line = BACKLOG .. model .. ':' .. class
    for _, id in ipairs(redis.call('ZRANGE', line, 0, -1)) do
      if not present(line, id) then leave_backlog(id, model, class) end
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', LEASES .. model, 0, -1)) do
    present(LEASES .. model, id)
  end
end
for _, id in ipairs(redis.call('ZRANGE', WATCHES, 0, -1)) do
  present(WATCHES, id)
end
for _, id in ipairs(redis.call('ZRANGE', DEADLINES, 0, -1)) do
  if present(DEADLINES, id) then
    local job = redis.call('HMGET', JOB .. id, 'model', 'state', 'cost', 'key')
    local total = totals[job[1]]
    if total and total[job[2]] then
      total[job[2]] = total[job[2]] + 1
      total[job[2] .. '_cost'] = total[job[2] .. '_cost'] + job[3]
      local field = (job[2] == 'queued' and 'k:' or 'r:') .. job[4]
      total.of_keys[field] = (total.of_keys[field] or 0) + 1
    end
  end
end
for model, total in pairs(totals) do
  if redis.call('EXISTS', COUNTS .. model) == 1 then
    redis.call('HSET', COUNTS .. model, 'queued', total.queued, 'queued_cost', total.queued_cost,
      'running', total.running, 'running_cost', total.running_cost)
    for _, field in ipairs(redis.call('HKEYS', COUNTS .. model)) do
      if string.match(field, '^[kr]:') then redis.call('HDEL', COUNTS .. model, field) end
    end
    for field, jobs in pairs(total.of_keys) do redis.call('HSET', COUNTS .. model, field, jobs) end
  end
end
return removed
