#pragma once
// What a row of results was measured on; bench/report.py is the Python side: same keys, same words.

#include <nlohmann/json.hpp>

namespace thinwire::launch {

/// cpu, cpus, isas, isa (the one in use), memory_gib, system, date (UTC), commit (THINWIRE_COMMIT, or "unknown"), load (over the last
/// minute). @throws Error{invalid_config} if THINWIRE_ISA asks for what this CPU lacks.
nlohmann::json describe_machine();

}  // namespace thinwire::launch
