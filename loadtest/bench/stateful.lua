-- What the scripts share whose next request needs the answer before it: reading FILE, filling slots, reading the answers
-- of each system, adding up what all threads counted. One thread for each connection: wrk -t N -c N ... -- FILE SEED SYSTEM [HOST:PORT]...
--
-- A script sets the globals `operations` and `refused` (comparisons that failed, locks that were held): wrk counts
-- requests, and an operation may take several.

local folder = string.match(debug.getinfo(1, "S").source, "^@(.*/)") or ""
dofile(folder .. "threads.lua")

operations = 0
refused = 0
refused_as_errors = 0 -- those that wrk counts as errors, too: their status is 400 or above

local TABLE_LINE = 26

-- The templates of this thread's connection, in their order. See write_sections in stateful.py.
function read_templates(path)
  local file = assert(io.open(path, "rb"))
  file:seek("set", place * TABLE_LINE)
  local offset, length = string.match(file:read(TABLE_LINE), "(%d+) (%d+)")
  file:seek("set", tonumber(offset))
  local text = file:read(tonumber(length))
  file:close()
  local templates = {}
  local position = 1
  while position <= #text do
    local line_end = assert(string.find(text, "\n", position, true))
    local known, numbers = string.match(string.sub(text, position, line_end - 1), "^(%S+) (.*)$")
    local template = { known = known, texts = {}, slots = {} }
    position = line_end + 1
    local is_text = true
    for number in string.gmatch(numbers, "%d+") do
      if is_text then
        table.insert(template.texts, string.sub(text, position, position + tonumber(number) - 1))
        position = position + tonumber(number)
      else
        table.insert(template.slots, "%" .. number .. "s")
      end
      is_text = not is_text
    end
    templates[#templates + 1] = template
  end
  return templates
end

-- The bytes of a request, with as many of the texts as it has slots, flush right.
function fill(template, first, second)
  local texts, slots = template.texts, template.slots
  if #slots == 0 then
    return texts[1]
  elseif #slots == 1 then
    return texts[1] .. string.format(slots[1], first) .. texts[2]
  end
  return texts[1] .. string.format(slots[1], first) .. texts[2] .. string.format(slots[2], second) .. texts[3]
end

function count_refused(status)
  refused = refused + 1
  if status >= 400 then
    refused_as_errors = refused_as_errors + 1
  end
end

-- --- answers -----------------------------------------------------------------------------------------------------------

local ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
local letters, numbers = {}, {}
for number = 0, 63 do
  letters[number] = string.sub(ALPHABET, number + 1, number + 1)
  numbers[string.byte(ALPHABET, number + 1)] = number
end

-- Of texts whose length is a multiple of three.
local function to_base64(text)
  local parts = {}
  for position = 1, #text, 3 do
    local a, b, c = string.byte(text, position, position + 2)
    local bits = a * 65536 + b * 256 + c
    parts[#parts + 1] = letters[math.floor(bits / 262144)] .. letters[math.floor(bits / 4096) % 64]
      .. letters[math.floor(bits / 64) % 64] .. letters[bits % 64]
  end
  return table.concat(parts)
end

local function from_base64(text)
  local parts = {}
  for position = 1, #text, 4 do
    local a, b, c, d = string.byte(text, position, position + 3)
    local bits = numbers[a] * 262144 + numbers[b] * 4096 + (numbers[c] or 0) * 64 + (numbers[d] or 0)
    local three = string.char(math.floor(bits / 65536), math.floor(bits / 256) % 256, bits % 256)
    parts[#parts + 1] = string.sub(three, 1, (numbers[c] and 1 or 0) + (numbers[d] and 1 or 0) + 1)
  end
  return table.concat(parts)
end

-- Each function returns nil when the answer does not say that.
--   written, failed: the version after a compare-and-set that was done, or refused
--   read: version and number of a counter; counter: what is sent for a number
--   session, granted: what acquiring, and releasing, needs
systems = {
  kvstore = {
    written = function(status, headers)
      return (status == 204 or status == 201) and headers["ETag"] or nil
    end,
    failed = function(status, headers)
      return status == 412 and headers["ETag"] or nil
    end,
    read = function(status, headers, body)
      if status == 200 then
        return headers["ETag"], tonumber(body)
      end
    end,
    counter = function(number)
      return string.format("%012d", number)
    end,
    granted = function(status, headers)
      return status == 201 and headers["Lock-Token"] or nil
    end,
    held = function(status)
      return status == 423
    end,
    released = function(status)
      return status == 204
    end,
  },
  etcd = {
    written = function(status, _, body)
      return status == 200 and string.find(body, '"succeeded":true', 1, true) and string.match(body, '"revision":"(%d+)"') or nil
    end,
    failed = function(status, _, body)
      if status == 200 and not string.find(body, '"succeeded":true', 1, true) then
        return string.match(body, '"mod_revision":"(%d+)"') or "0"
      end
    end,
    read = function(status, _, body)
      if status == 200 then
        return string.match(body, '"mod_revision":"(%d+)"'), tonumber(from_base64(string.match(body, '"value":"([^"]+)"')))
      end
    end,
    counter = function(number)
      return '"' .. to_base64(string.format("%012d", number)) .. '"'
    end,
    needs_session = true,
    session = function(status, _, body)
      return status == 200 and string.match(body, '"ID":"(%d+)"') or nil
    end,
    granted = function(status, _, body)
      return status == 200 and string.match(body, '"key":("[^"]+")') or nil
    end,
    held = function()
      return false -- it would wait instead
    end,
    released = function(status)
      return status == 200
    end,
  },
}

function done(summary, latency, _)
  print_result(summary, latency, {
    operations = total("operations"),
    refused = total("refused"),
    status = summary.errors.status - total("refused_as_errors"),
  })
end
