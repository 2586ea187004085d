// thinwire_bench_kernels: every kernel beside memcpy and in-place axpy in the same repetitions. One thread, pinned.

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>

#include "bench/kernels_cases.hpp"
#include "compressors/core/error.hpp"

namespace thinwire::bench {
namespace {

nlohmann::json json_of(const Row& row) {
  return {{"kernel", row.kernel},
          {"isa", row.isa ? nlohmann::json(row.isa) : nlohmann::json()},
          {"backend", "cpu"},
          {"numel", row.numel},
          {"density", row.density ? nlohmann::json(*row.density) : nlohmann::json()},
          {"bytes_per_element", row.bytes_per_element},
          {"seconds_median", row.seconds_median},
          {"seconds_min", row.seconds_min},
          {"gb_per_s", row.gb_per_s},
          {"ratio_memcpy", row.ratio_memcpy},
          {"ratio_axpy", row.ratio_axpy},
          {"paired_time", nullptr}};
}

void print(const Row& row) {
  char density[32] = "-";
  if (row.density) std::snprintf(density, sizeof density, "%.3f", *row.density * 100);
  std::printf("%-30s %-7s %8s %7.2f %9.2f %9.2f %7.1f %9.2f %8.2f\n", row.kernel.c_str(), row.isa ? row.isa : "-", density,
              row.bytes_per_element, row.seconds_median * 1e3, row.seconds_min * 1e3, row.gb_per_s, row.ratio_memcpy, row.ratio_axpy);
  // A quarter too many or too few entries and the row is not the one that its name says.
  if (row.density && row.claimed && std::abs(*row.density / *row.claimed - 1) > 0.25) {
    std::printf("  ^ density %.4g was asked for and not reached\n", *row.claimed);
  }
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  std::size_t numel = std::size_t(32) << 20, repetitions = 11;
  std::string isa = "auto", filter, file;
  bool list = false;
  CLI::App app("Every kernel beside memcpy and in-place axpy: medians of the ratios of paired repetitions, one thread.");
  app.add_option("--numel", numel, "elements of the arrays")
      ->check(CLI::Range(std::size_t(1), std::size_t(0xffffffff)))
      ->capture_default_str();
  app.add_option("--reps", repetitions, "repetitions; fewer than 9 are noise")
      ->check(CLI::Range(std::size_t(1), std::size_t(100000)))
      ->capture_default_str();
  app.add_option("--isa", isa, "auto, scalar, avx2 or avx512")
      ->check(CLI::IsMember({"auto", "scalar", "avx2", "avx512"}))
      ->capture_default_str();
  app.add_option("--filter", filter, "only kernels whose <name>/<density> this regular expression finds");
  app.add_option("--json", file, "where to write {\"rows\": [...]}");
  app.add_flag("--list", list, "print the names and stop");
  CLI11_PARSE(app, argc, argv);

  std::regex pattern;
  try {
    pattern = std::regex(filter);
  } catch (const std::regex_error& e) {
    std::fprintf(stderr, "--filter %s is not a regular expression: %s\n", filter.c_str(), e.what());
    return 2;
  }
  const Isa chosen = isa == "auto" ? active_isa() : parse_isa(isa);
  std::vector<Group> groups;
  for (Group& group : all_groups(chosen, numel)) {
    for (const std::string& name : group.names) {
      if (!std::regex_search(name, pattern)) continue;
      if (list) std::printf("%s\n", name.c_str());
      groups.push_back(std::move(group));
      break;
    }
  }
  if (list) return 0;

  nlohmann::json rows = nlohmann::json::array();
  if (!groups.empty()) {
    const int cpu = pin_this_thread();
    Arrays arrays(numel, Placement::arena);
    References references(arrays);
    std::printf("%zu elements, %zu repetitions, isa %s, one thread on CPU %d\narena, from the gradient: %s\n\n", numel, repetitions,
                to_string(chosen), cpu, arrays.offsets().c_str());
    std::printf("%-30s %-7s %8s %7s %9s %9s %7s %9s %8s\n", "kernel", "isa", "density%", "B/elem", "ms", "ms best", "GB/s", "x memcpy",
                "x axpy");
    std::string pairs;
    const auto keep = [&](const Row& row) {
      print(row);
      rows.push_back(json_of(row));
    };
    for (const Row& row : measure_references(references, repetitions)) keep(row);
    for (const Group& group : groups) {
      const std::vector<std::unique_ptr<Kernel>> kernels = group.make(arrays);
      std::vector<Kernel*> views;
      for (const auto& kernel : kernels) views.push_back(kernel.get());
      const std::vector<Row> measured = measure(views, references, repetitions);
      for (const Row& row : measured) keep(row);
      if (group.pair.empty()) continue;
      rows.back()["paired_time"] = measured.back().time_to_first;
      char line[200];
      std::snprintf(line, sizeof line, "%s: %.3fx (%s)\n", group.pair.c_str(), measured.back().time_to_first,
                    measured.back().kernel.c_str());
      pairs += line;
    }
    if (!pairs.empty()) std::printf("\n%s", pairs.c_str());
  }
  if (!file.empty()) {
    std::ofstream out(file);
    out << nlohmann::json{{"rows", rows}}.dump(1) << "\n";
    if (!out) {
      std::fprintf(stderr, "cannot write %s\n", file.c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace thinwire::bench

int main(int argc, char** argv) {
  try {
    return thinwire::bench::run(argc, argv);
  } catch (const thinwire::Error& e) {
    std::fprintf(stderr, "%s: %s\n", thinwire::to_string(e.code()), e.what());
    return e.code() == thinwire::Errc::invalid_config ? 2 : 1;
  }
}
