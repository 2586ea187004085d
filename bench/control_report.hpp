#pragma once
// What the sections of error_control.cpp write into: rows, curves, and what was not as expected.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/control_reference.hpp"

namespace thinwire::bench {

using Json = nlohmann::json;

struct Report {
  Json rows = Json::array();
  std::vector<std::string> violated;

  void expect(bool holds, const std::string& what) {
    if (!holds) violated.push_back(what);
  }
  void curve(Json& row, const Run& run, std::size_t every) {
    row["every"] = every;
    row["distance"] = run.distances;
    row["residual"] = run.residuals;
  }
};

inline std::string text_of(const Run& run) {
  char text[32];
  if (run.diverged) return "diverges";
  if (!run.reached) return std::snprintf(text, sizeof text, "(%.2e)", run.plateau), text;
  return std::to_string(run.steps);
}
inline std::string number(double x) {
  char text[32];
  return std::snprintf(text, sizeof text, "%.3g", x), text;
}
inline bool near_count(std::size_t a, std::size_t b) { return std::fabs(double(a) - double(b)) <= std::max(1.0, 0.02 * double(b)); }

/// The sections on least squares (control_least_squares.cpp).
void least_squares(Report& report, double zeta);
void signs(Report& report);
void best_rates(Report& report, double kappa);
void best_levels(Report& report);
void starts_from_zero(Report& report);
void independence(Report& report);
/// The small network (control_network.cpp), and the search for its rates, a quarter of an hour.
void network(Report& report);
void search_rates();

}  // namespace thinwire::bench
