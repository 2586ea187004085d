#include "launch/trainer/machine.hpp"

#include <sys/utsname.h>

#include <cmath>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <map>
#include <string>
#include <thread>

#include "compressors/core/isa.hpp"

namespace thinwire::launch {

namespace {

/// "key : value" lines of /proc; of a key that comes again the first counts.
std::map<std::string, std::string> fields_of(const char* path) {
  std::map<std::string, std::string> fields;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':'), start = line.find_first_not_of(" \t", colon == std::string::npos ? line.size() : colon + 1);
    if (colon == std::string::npos) continue;
    const std::size_t last = line.find_last_not_of(" \t", colon == 0 ? 0 : colon - 1);
    fields.emplace(line.substr(0, last + 1), start == std::string::npos ? "" : line.substr(start));
  }
  return fields;
}

/// The model name; virtual machines hide it, so family and model stand beside it.
std::string cpu_model(const std::string& otherwise) {
  std::map<std::string, std::string> cpu = fields_of("/proc/cpuinfo");
  const std::string name = cpu.contains("model name") ? cpu["model name"] : otherwise;
  return cpu.contains("model") ? name + " (family " + cpu["cpu family"] + " model " + cpu["model"] + ")" : name;
}

double rounded(double value, double unit) { return std::round(value * unit) / unit; }

}  // namespace

nlohmann::json describe_machine() {
  utsname system{};
  uname(&system);
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char date[16];
  std::strftime(date, sizeof date, "%Y-%m-%d", &utc);
  double load = 0;
  if (getloadavg(&load, 1) != 1) load = -1;
  nlohmann::json isas = nlohmann::json::array();
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (cpu_supports(isa)) isas.push_back(to_string(isa));
  }
  const char* commit = std::getenv("THINWIRE_COMMIT");
  return {{"cpu", cpu_model(system.machine)},
          {"cpus", std::thread::hardware_concurrency()},
          {"isas", isas},
          {"isa", to_string(active_isa())},
          {"memory_gib", rounded(std::strtod(fields_of("/proc/meminfo")["MemTotal"].c_str(), nullptr) / (1 << 20), 10)},
          {"system", std::string(system.sysname) + " " + system.release},
          {"date", date},
          {"commit", commit != nullptr ? commit : "unknown"},
          {"load", rounded(load, 100)}};
}

}  // namespace thinwire::launch
