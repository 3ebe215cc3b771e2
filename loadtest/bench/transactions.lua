-- Replays transactions as replay.lua does, and counts the answers by status:
-- wrk ... -s transactions.lua URL -- FILE SEED SYSTEM [HOST:PORT]...
--
-- An operation is a transaction that was carried out. With response(), wrk hands every answer to Lua, the same for every
-- system: replay.lua's own count does not tell a conflict from a failure.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "replay.lua")

operations = 0

function response(status)
  if status >= 200 and status < 300 then
    operations = operations + 1
  else
    local name = "status_" .. status
    _G[name] = (_G[name] or 0) + 1
  end
end

function done(summary, latency, _)
  local counted = { operations = total("operations"), attempts = total("operations"), status = summary.errors.status }
  for status = 300, 599 do
    local count = total("status_" .. status)
    if count > 0 then
      counted[tostring(status)] = count
      counted.attempts = counted.attempts + count
      counted.status = counted.status - (status >= 400 and count or 0)
    end
  end
  print_result(summary, latency, counted)
end
