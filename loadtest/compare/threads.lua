-- What all scripts share: which thread is which, which router it asks, and what all of them have counted.
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
