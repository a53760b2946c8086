-- Where a queued job stands: {position (1 = next), queued jobs, their cost, cost served per second}.
local function place(id, model, class)
  local position = redis.call('ZRANK', BACKLOG .. model .. ':' .. class, id)
  local counts = redis.call('HMGET', COUNTS .. model, 'queued', 'queued_cost', 'speed')
  if not position then
    return { 0, counts[1] or '0', counts[2] or '0', counts[3] or '0' }
  end
  for higher = 0, class - 1 do
    position = position + redis.call('ZCARD', BACKLOG .. model .. ':' .. higher)
  end
  return { position + 1, counts[1] or '0', counts[2] or '0', counts[3] or '0' }
end
