-- Acquire and release locks with random names, one after the other; an operation is both. See stateful.lua.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "stateful.lua")

local system, templates, session_template, session, release, token

function init(args)
  choose_router(args)
  templates = read_templates(args[1])
  math.randomseed(tonumber(args[2]) + place)
  system = systems[args[3]]
  if system.needs_session then
    session_template = table.remove(templates, 1)
  end
end

function request()
  if session_template and not session then
    return fill(session_template)
  elseif token then
    return fill(release, token)
  end
  local number = 2 * math.random(#templates / 2)
  release = templates[number]
  return fill(templates[number - 1], session)
end

function response(status, headers, body)
  if session_template and not session then
    session = system.session(status, headers, body)
  elseif token then
    if system.released(status) then
      operations = operations + 1
    end
    token = nil
  else
    token = system.granted(status, headers, body)
    if system.held(status) then
      count_refused(status)
    end
  end
end
