-- What all scripts share: which thread is which, which router it asks, what all of them have counted, the line of figures.
--
-- wrk ... -s SCRIPT URL -- FILE SEED SYSTEM [HOST:PORT]...: thread number N asks the N-th of these addresses, and then
-- from the first on again; without any, all ask the URL's. The connections are shared equally among the threads.

threads = {} -- only where `done` runs; a thread itself knows its `place`, from 0

function setup(thread)
  thread:set("place", #threads)
  threads[#threads + 1] = thread
end

local FIRST_ADDRESS = 4

-- To be called in `init`, before any connection is made.
function choose_router(args)
  local count = #args - FIRST_ADDRESS + 1
  if count > 0 then
    local host, port = string.match(args[FIRST_ADDRESS + place % count], "^(.*):(%d+)$")
    wrk.thread.addr = wrk.lookup(host, port)[1]
  end
end

-- The sum of a global of the threads.
function total(name)
  local sum = 0
  for _, thread in ipairs(threads) do
    sum = sum + (thread:get(name) or 0)
  end
  return sum
end

-- One line of JSON instead of wrk's text for people: no units to guess. `counted`: what the script adds, or knows better.
function print_result(summary, latency, counted)
  local errors = summary.errors
  local figures = {
    duration_us = summary.duration, requests = summary.requests,
    connect = errors.connect, read = errors.read, write = errors.write, status = errors.status, timeout = errors.timeout,
    p50_us = latency:percentile(50), p99_us = latency:percentile(99), max_us = latency.max,
  }
  for name, figure in pairs(counted) do
    figures[name] = figure
  end
  local members = {}
  for name, figure in pairs(figures) do
    members[#members + 1] = string.format('"%s":%d', name, figure)
  end
  io.write("RESULT {" .. table.concat(members, ",") .. "}\n")
end
