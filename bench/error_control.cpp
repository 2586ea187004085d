// thinwire_bench_error_control: error feedback side by side on small problems, over the real engine, beside a reference in double precision
// and what is expected of it. Where eta is a little too large the reference diverges, and the engine's watchdog lowers it. Exit 1 if a
// number is not as expected.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/control_engine.hpp"
#include "bench/control_report.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire::bench {
namespace {

void divergence(Report& report) {
  std::printf(
      "Three quadratics whose gradients top-1 misreads; steps to ‖x‖² < 1e-20 (engine, and the reference once more: < 1e-10)\n%-22s %10s "
      "%10s %10s %10s\n",
      "method", "expected", "reference", "once more", "engine");
  const ThreeQuadratics problem;
  const Descent descent{.gamma = 0.01, .stop = 1e-20, .most = 5000};
  const struct {
    const char* name;
    Method method;
    double eta;
    const char* feedback;
    std::size_t expected;
  } entries[] = {{"no feedback", Method::naive, 0, "none", 0},
                 {"EF14", Method::ef14, 0, "ef14", 1986},
                 {"EF21", Method::ef21, 0, "ef21", 1987},
                 {"EControl .05", Method::econtrol, 0.05, "econtrol:eta=0.05", 2016}};
  for (const auto& entry : entries) {
    Descent own = descent;
    if (entry.expected == 0) own.most = 100;
    const bool grows = entry.expected == 0;
    const Run reference = run_reference(problem, entry.method, entry.eta, 1, top(1), own);
    if (!grows) own.stop = 1e-10;  // what the first step's fp32 rounds of the estimates stays in them
    const Run rough = run_reference(problem, entry.method, entry.eta, 1, top(1), own);
    const Run engine =
        run_engine(problem, std::string("codec=topk:density=0.3,select=exact exchange=gather min_numel=1 feedback=") + entry.feedback, own);
    // Without feedback x grows by 1 + 11·gamma/6 a step.
    const double grown = std::pow(1 + 11 * own.gamma / 6, 200) * 3;
    const auto growth = [](double distance) { return "x " + number(std::sqrt(distance / 3)); };
    std::printf("%-22s %10s %10s %10s %10s\n", entry.name, (grows ? growth(grown) : std::to_string(entry.expected)).c_str(),
                (grows ? growth(reference.last) : text_of(reference)).c_str(), (grows ? growth(rough.last) : text_of(rough)).c_str(),
                (grows ? growth(engine.last) : text_of(engine)).c_str());
    report.expect(grows ? std::fabs(engine.last / grown - 1) < 1e-3
                        : near_count(reference.steps, entry.expected) && near_count(engine.steps, rough.steps),
                  std::string("three quadratics, ") + entry.name);
    Json row = {{"section", "quadratics"},
                {"method", entry.name},
                {"expected", grows ? Json() : Json(entry.expected)},
                {"reference", reference.steps},
                {"once_more", grows ? Json() : Json(rough.steps)},
                {"engine", engine.steps}};
    report.curve(row, engine, own.every);
    report.rows.push_back(row);
  }
}

/// The level that gradient noise leaves, mean of ‖grad f‖² over the last quarter.
void noise(Report& report, int world, std::size_t steps, double scale) {
  const double theory = 0.018031;
  const struct {
    const char* name;
    Method method;
    double eta, average;
    const char* feedback;
    double expected[3];
  } entries[] = {{"uncompressed", Method::sgd, 0, 1, "", {0.194, 0.0478, 0.0127}},
                 {"EF14", Method::ef14, 0, 1, "ef14", {0.341, 0.0574, 0.0135}},
                 {"EF21", Method::ef21, 0, 1, "ef21", {1.42, 0.320, 0.084}},
                 {"EF21-SGDM .1", Method::ef21, 0, 0.1, "ef21:worker_ema=0.1", {0.202, 0.0503, 0.0134}},
                 {"EControl theory", Method::econtrol, theory, 1, "econtrol:eta=theory", {0.757, 0.185, 0.0474}},
                 {"EControl theory + .1", Method::econtrol, theory, 0.1, "econtrol:eta=theory,worker_ema=0.1", {0.205, 0.0497, 0.0133}},
                 {"EControl auto", Method::econtrol, 0.1, 1, "econtrol", {0, 0.0948, 0}}};
  std::printf("\nNoise of deviation 10, %d ranks, zeta = 10: mean ‖grad f‖² of the last quarter of %zu steps\n%-22s %10s %10s %10s\n",
              world, steps, "method", "expected", "reference", "engine");
  const LeastSquares problem(world, 20, 10);
  const Descent descent{.gamma = 1 / (64 * problem.smoothness()), .stop = 0, .sigma = 10, .most = steps};
  for (const auto& entry : entries) {
    const double want = entry.expected[world == 4 ? 0 : world == 16 ? 1 : 2];
    if (want == 0) continue;  // no published level
    const Run reference = run_reference(problem, entry.method, entry.eta, entry.average, top(2), descent);
    const Run engine =
        run_engine(problem,
                   entry.feedback[0] == '\0'
                       ? "codec=none"
                       : std::string("codec=topk:density=0.1,select=exact exchange=gather min_numel=1 feedback=") + entry.feedback,
                   descent);
    std::printf("%-22s %10s %10.3g %10.3g\n", entry.name, number(want).c_str(), reference.plateau, engine.plateau);
    // Levels are means of correlated noise: `scale` allows for the fewer steps here.
    report.expect(engine.plateau < want * scale && engine.plateau > want / scale,
                  "noise, " + std::to_string(world) + " ranks, " + entry.name);
    report.rows.push_back({{"section", "noise"},
                           {"world", world},
                           {"method", entry.name},
                           {"expected", want},
                           {"reference", reference.plateau},
                           {"engine", engine.plateau}});
  }
}

/// The same level by eta, in the reference alone: the smaller, the longer a residual's noise stays.
void noise_by_eta(Report& report, std::size_t steps) {
  std::printf("\nThe same by eta, 16 ranks, reference, %zu steps\n%-22s %10s %10s\n", steps, "method", "expected", "reference");
  const LeastSquares problem(16, 20, 10);
  const Descent descent{.gamma = 1 / (64 * problem.smoothness()), .stop = 0, .sigma = 10, .most = steps};
  for (const auto& [eta, want] : {std::pair(0.00025, 0.344), {0.005, 0.272}, {0.018031, 0.185}, {0.05, 0.124}, {0.1, 0.0948}}) {
    const Run reference = run_reference(problem, Method::econtrol, eta, 1, top(2), descent);
    std::printf("%-22s %10.3g %10.3g\n", ("EControl " + number(eta)).c_str(), want, reference.plateau);
    report.expect(reference.plateau < want * 1.1 && reference.plateau > want / 1.1, "noise by eta, " + number(eta));
    report.rows.push_back({{"section", "noise_by_eta"},
                           {"world", 16},
                           {"method", "EControl"},
                           {"eta", eta},
                           {"expected", want},
                           {"reference", reference.plateau}});
  }
}

/// Why states follow the bytes that were sent, and an estimate in two bytes its grid: the reference without.
void broken_rules(Report& report, std::size_t steps) {
  std::printf("\nThe rules broken, EControl auto, the same problem, reference, %zu steps\n%-32s %10s %12s %10s %12s %10s %12s\n", steps,
              "wire and state", "expected", "no noise", "expected", "noise", "expected", "drift");
  const LeastSquares problem(16, 20, 10);
  const Descent still{.gamma = 1 / (32 * problem.smoothness()), .stop = 0, .most = steps},
      noisy{.gamma = still.gamma, .stop = 0, .sigma = 10, .most = steps};
  const struct {
    const char* name;
    Variant variant;
    double quiet, loud, drift;
  } entries[] = {{"wire=bf16", {.wire = as_bf16}, 0, 0.258, 0},
                 {"residual in fp16", {.residual = as_fp16}, 9e-8, 0.258, 0},
                 {"wire=bf16, state unrounded", {.wire = as_bf16, .unrounded_state = true}, 2.5e-5, 0.788, 2.5e-3},
                 {"estimate in bf16, off the grid", {.estimate = as_bf16}, 2.9e-2, 0.55, 0.06}};
  for (const auto& [name, variant, quiet_wanted, loud_wanted, drift_wanted] : entries) {
    const Run quiet = run_reference(problem, Method::econtrol, 0.1, 1, top(2), still, variant),
              loud = run_reference(problem, Method::econtrol, 0.1, 1, top(2), noisy, variant);
    std::printf("%-32s %10s %12.3g %10s %12.4g %10s %12.3g\n", name, number(quiet_wanted).c_str(), quiet.plateau,
                number(loud_wanted).c_str(), loud.plateau, number(drift_wanted).c_str(), quiet.drift);
    const bool broken = drift_wanted != 0;
    report.expect(broken ? quiet.plateau > 1e-7 && quiet.plateau < 2 * quiet_wanted && quiet.drift > 1e-4 && loud.plateau > 0.4
                         : quiet.plateau < std::max(1e-9, 2 * quiet_wanted) && quiet.drift < 1e-12 && loud.plateau < 0.28,
                  std::string("rules: ") + name);
    report.rows.push_back({{"section", "broken_rules"},
                           {"method", name},
                           {"expected", quiet_wanted},
                           {"reference", quiet.plateau},
                           {"noise_expected", loud_wanted},
                           {"noise", loud.plateau},
                           {"drift_expected", drift_wanted},
                           {"drift", quiet.drift}});
  }
}

/// What dtypes cost, on the wire and of the state, and how far H drifts from the mean of h.
void dtypes(Report& report, std::size_t steps) {
  std::printf(
      "\nDtypes, EControl auto, 16 ranks, zeta = 10, %zu steps: mean ‖grad f‖² of the last quarter without noise and with (deviation 10), "
      "max "
      "|H − mean h|, and bytes of state per parameter\n%-32s %10s %12s %12s %12s %6s\n",
      steps, "wire and state", "expected", "no noise", "noise", "drift", "bytes");
  const LeastSquares problem(16, 20, 10);
  const Descent still{.gamma = 1 / (32 * problem.smoothness()), .stop = 0, .most = steps},
      noisy{.gamma = still.gamma, .stop = 0, .sigma = 10, .most = steps};
  const struct {
    const char *codec, *feedback;
    double expected;  // without noise; what reaches fp32's own floor: 0
  } entries[] = {{"", "", 0},
                 {",wire=bf16", "", 0},
                 {",wire=fp16", "", 0},
                 {"", ":residual=bf16", 0},
                 {"", ":estimate=grid", 2.1e-6},
                 {"", ":residual=bf16,estimate=grid", 2.1e-6}};
  double wide = 0;
  for (const auto& [codec, feedback, expected] : entries) {
    const std::string name = codec[0] == '\0' && feedback[0] == '\0' ? "fp32" : std::string(codec) + feedback;
    const std::string config =
        std::string("codec=topk:density=0.1,select=exact") + codec + " exchange=gather min_numel=1 feedback=econtrol" + feedback;
    double drift = 0;
    const Run quiet = run_engine(problem, config, still, &drift), loud = run_engine(problem, config, noisy);
    if (wide == 0) wide = loud.plateau;
    const Recursion recursion = make_recursion(Config::parse(config));
    std::size_t bytes = 0;
    for (std::size_t j = 0; j < state_names(recursion).size(); ++j) bytes += size_of(state_dtype(recursion, j));
    std::printf("%-32s %10s %12.3g %12.4g %12.3g %6zu\n", name.substr(name[0] == 'f' ? 0 : 1).c_str(),
                expected == 0 ? "< 1e-9" : number(expected).c_str(), quiet.plateau, loud.plateau, drift, bytes);
    // H and h are updated by the same rounded values: only fp32's own rounding is left, of numbers below 64.
    report.expect((expected == 0 ? quiet.plateau < 1e-9 : quiet.plateau < 2 * expected) && drift < 1e-4, "dtypes: " + name);
    // Levels of a thousand steps scatter by a tenth; an h in bf16 off the grid would double this one.
    report.expect(loud.plateau < 1.25 * wide && loud.plateau > wide / 1.25, "dtypes: " + name + " with noise");
    report.rows.push_back({{"section", "dtypes"},
                           {"method", name},
                           {"expected", expected},
                           {"engine", quiet.plateau},
                           {"noise", loud.plateau},
                           {"drift", drift},
                           {"bytes", bytes}});
  }
}

int run(int argc, char** argv) {
  std::string file;
  bool quick = false, search = false;
  CLI::App app(
      "Error feedback side by side on small problems: over the real engine, ranks as threads, beside a reference in double precision.");
  app.add_flag("--quick", quick, "the first two tables only");
  app.add_flag("--search", search,
               "instead of all tables: the losses of the small network at all learning rates of the grid that its rates come from");
  app.add_option("--json", file, "where to write {\"rows\": [...]}, curves of distance and residual among them");
  CLI11_PARSE(app, argc, argv);
  if (search) return search_rates(), 0;
  const auto begin = std::chrono::steady_clock::now();
  Report report;
  divergence(report);
  least_squares(report, 0);
  if (!quick) {
    least_squares(report, 10);
    least_squares(report, 100);
    best_rates(report, 1);
    best_rates(report, 100);
    best_levels(report);
    starts_from_zero(report);
    independence(report);
    signs(report);
    noise(report, 4, 8000, 1.5);
    noise(report, 16, 4000, 1.5);
    noise(report, 64, 1000, 1.5);
    noise_by_eta(report, 40000);
    dtypes(report, 3000);
    broken_rules(report, 40000);
    network(report);
  }
  if (!file.empty()) {
    std::ofstream out(file);
    out << Json{{"rows", report.rows}}.dump(1) << "\n";
    if (!out) {
      std::fprintf(stderr, "cannot write %s\n", file.c_str());
      return 1;
    }
  }
  std::printf("\n%.0f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  for (const std::string& what : report.violated) std::printf("not as expected: %s\n", what.c_str());
  if (report.violated.empty()) std::printf("all as expected\n");
  return report.violated.empty() ? 0 : 1;
}

}  // namespace
}  // namespace thinwire::bench

int main(int argc, char** argv) {
  try {
    return thinwire::bench::run(argc, argv);
  } catch (const thinwire::Error& e) {
    std::fprintf(stderr, "%s: %s\n", thinwire::to_string(e.code()), e.what());
    return 1;
  }
}
