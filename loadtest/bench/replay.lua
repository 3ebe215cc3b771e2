-- Replays HTTP requests that were written out beforehand, in random order: wrk ... -s replay.lua URL -- FILE SEED SYSTEM [HOST:PORT]...
--
-- FILE holds the bytes of whole requests, each preceded by its length and a line end. Everything that costs time happens
-- in init, so that a request is one random number and one table look-up, the same for every system. There is no
-- response(): with one, wrk would hand every header of every answer to Lua.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "threads.lua")

local requests = {}
local count = 0
local random = math.random

function init(args)
  choose_router(args)
  local file = assert(io.open(args[1], "rb"))
  local text = file:read("*a")
  file:close()
  local position = 1
  while position <= #text do
    local line_end = assert(string.find(text, "\n", position, true))
    local length = assert(tonumber(string.sub(text, position, line_end - 1)))
    count = count + 1
    requests[count] = string.sub(text, line_end + 1, line_end + length)
    position = line_end + length + 1
  end
  math.randomseed(tonumber(args[2]) + place)
end

function request()
  return requests[random(count)]
end

function done(summary, latency, _)
  print_result(summary, latency, {})
end
