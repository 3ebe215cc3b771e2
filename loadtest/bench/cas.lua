-- Compare-and-set on random keys, each with the version that the last answer told: see stateful.lua.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "stateful.lua")

local system, templates, current

function init(args)
  choose_router(args)
  templates = read_templates(args[1])
  math.randomseed(tonumber(args[2]) + place)
  system = systems[args[3]]
end

function request()
  current = templates[math.random(#templates)]
  return fill(current, current.known)
end

function response(status, headers, body)
  local version = system.written(status, headers, body)
  if version then
    operations = operations + 1
    current.known = version
    return
  end
  version = system.failed(status, headers, body)
  if version then
    count_refused(status)
    current.known = version
  end
end
