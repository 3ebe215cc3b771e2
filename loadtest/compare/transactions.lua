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
  local errors = summary.errors
  local done_well = total("operations")
  local attempts, told, by_status = done_well, 0, ""
  for status = 300, 599 do
    local count = total("status_" .. status)
    if count > 0 then
      by_status = by_status .. string.format(',"%d":%d', status, count)
      attempts = attempts + count
      told = told + (status >= 400 and count or 0)
    end
  end
  io.write(string.format(
    'RESULT {"duration_us":%d,"requests":%d,"operations":%d,"attempts":%d,"connect":%d,"read":%d,"write":%d,' ..
    '"status":%d,"timeout":%d,"p50_us":%d,"p99_us":%d,"max_us":%d%s}\n',
    summary.duration, summary.requests, done_well, attempts, errors.connect, errors.read, errors.write,
    errors.status - told, errors.timeout,
    latency:percentile(50), latency:percentile(99), latency.max, by_status))
end
