-- What wrk posts to several paths by turns, and how many requests went out in each turn. From the
-- environment: BODY and HEADERS as in load.lua, PATHS in their order, TURN_S.
local ffi = require("ffi")
ffi.cdef("typedef struct { long s, ns; } moment; int clock_gettime(int, moment *);")
local moment = ffi.new("moment")
local turn_s = tonumber(os.getenv("TURN_S"))
local threads, turns, begin = {}, {}, nil
counts = {}

local function now()
  ffi.C.clock_gettime(1, moment)
  return tonumber(moment.s) + tonumber(moment.ns) / 1e9
end

setup = function(thread)
  table.insert(threads, thread)
end

init = function()
  local file = io.open(os.getenv("BODY"), "rb")
  local body = file:read("*a")
  file:close()
  for name, value in string.gmatch(os.getenv("HEADERS") or "", "([^\n]-): ([^\n]+)") do
    wrk.headers[name] = value
  end
  local made = {}
  for path in string.gmatch(os.getenv("PATHS"), "%S+") do
    made[path] = made[path] or wrk.format("POST", path, wrk.headers, body)
    table.insert(turns, made[path])
    table.insert(counts, 0)
  end
end

request = function()
  begin = begin or now()
  local turn = math.min(math.floor((now() - begin) / turn_s) + 1, #turns)
  counts[turn] = counts[turn] + 1
  return turns[turn]
end

done = function(summary)
  local e = summary.errors
  io.write(string.format("FAILED %d\n", e.connect + e.read + e.write + e.timeout + e.status))
  io.write("TURNS " .. table.concat(threads[1]:get("counts"), " ") .. "\n")
end
