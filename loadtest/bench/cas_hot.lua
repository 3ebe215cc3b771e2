-- Increments of one counter: read it, set it to one more if it is unchanged, else begin again. See stateful.lua.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "stateful.lua")

local system, read, write, version, number

function init(args)
  choose_router(args)
  read, write = unpack(read_templates(args[1]))
  system = systems[args[3]]
end

function request()
  if version then
    return fill(write, version, system.counter(number + 1))
  end
  return fill(read)
end

function response(status, headers, body)
  if not version then
    version, number = system.read(status, headers, body)
    return
  end
  if system.written(status, headers, body) then
    operations = operations + 1
  elseif status == 412 or status == 200 then
    count_refused(status)
  end
  version = nil
end
