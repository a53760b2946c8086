-- Two token buckets per API key, of jobs and of cost: a minute's worth at once, filled steadily.
-- `per_minute` '' is no limit. Returns the milliseconds until the key may have this job, 0 when it may, and the levels.
local function rate_of(key, per_minute, wanted, now)
  local kept, levels, wait = redis.call('HMGET', RATE .. key, 'at', 'jobs', 'cost'), {}, 0
  for i, name in ipairs({ 'jobs', 'cost' }) do
    local most = tonumber(per_minute[i])
    if most then
      local level = math.min(most, (kept[i + 1] or most) + most * (now - (kept[1] or now)) / 60000)
      -- A job larger than the bucket needs a full one, and leaves a debt.
      wait = math.max(wait, (math.min(wanted[i], most) - level) / most * 60000)
      levels[name] = level - wanted[i]
    end
  end
  return math.ceil(wait), levels
end

local function spend(key, levels, now)
  for name, level in pairs(levels) do
    redis.call('HSET', RATE .. key, name, level, 'at', now)
    redis.call('PEXPIRE', RATE .. key, 3600000)
  end
end
