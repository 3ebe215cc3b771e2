-- Replays batches as replay.lua does, and looks at every answer: wrk ... -s batches.lua URL -- FILE SEED SYSTEM [HOST:PORT]...
--
-- A batch of which one operation has failed is answered with 200, and that operation has a `code` (see kvstore's
-- POST /v1/batch; no value of the benchmark looks so): it is `partial`, and counts as no batch that was done.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "replay.lua")

operations = 0
partial = 0

function response(status, _, body)
  if status < 200 or status >= 300 then
    return -- wrk counts it
  elseif string.find(body, '"code":', 1, true) then
    partial = partial + 1
  else
    operations = operations + 1
  end
end

function done(summary, latency, _)
  print_result(summary, latency, { operations = total("operations"), partial = total("partial") })
end
