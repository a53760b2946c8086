-- The server's clock is the only clock: no two machines need to agree.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- A key that serves many jobs lives as long as the longest of them; ten minutes more, so that few jobs must extend it.
local function live_until(key, at)
  if redis.call('PEXPIRETIME', key) < at then
    redis.call('PEXPIREAT', key, at + 600000)
  end
end
