// Least squares of ranks that differ: steps to a distance, or the level at which a method hovers.

#include <iterator>

#include "bench/control_engine.hpp"
#include "bench/control_report.hpp"

namespace thinwire::bench {
namespace {

struct Entry {
  const char* name;
  Method method;
  double eta;
  const char* feedback;  ///< of the engine's config; null: in the reference alone
};
constexpr Entry kEntries[] = {{"uncompressed", Method::sgd, 0, ""},
                              {"no feedback", Method::naive, 0, "none"},
                              {"EF14", Method::ef14, 0, "ef14"},
                              {"EC-Ideal", Method::ideal, 0, nullptr},
                              {"two messages (D-EC)", Method::two_messages, 0, nullptr},
                              {"EF21", Method::ef21, 0, "ef21"},
                              {"EControl paper", Method::econtrol, 0.00025, nullptr},
                              {"EControl .005", Method::econtrol, 0.005, "econtrol:eta=0.005"},
                              {"EControl theory", Method::econtrol, 0.018031, "econtrol:eta=theory"},
                              {"EControl .05", Method::econtrol, 0.05, "econtrol:eta=0.05"},
                              {"EControl auto", Method::econtrol, 0.1, "econtrol"},
                              {"EControl .2", Method::econtrol, 0.2, "econtrol:eta=0.2"},
                              {"EControl .3", Method::econtrol, 0.3, "econtrol:eta=0.3"},
                              {"EControl 1", Method::econtrol, 1, nullptr}};

/// Published: steps; or the level at which it hovers; or neither, and it diverges.
struct Expected {
  std::size_t steps;
  double level = 0;
  int power = 0;            ///< the best rate is 2^-power / L; 0: not told
  bool at_the_end = false;  ///< the level is that of the last step, and still falls; else of the last quarter

  bool hovers() const { return level != 0; }
  bool diverges() const { return steps == 0 && level == 0; }
  double level_of(const Run& run) const { return at_the_end ? run.last : run.plateau; }
  std::string text() const { return hovers() ? "(" + number(level) + ")" : diverges() ? "diverges" : std::to_string(steps); }
  std::string text(const Run& run) const { return run.reached || run.diverged ? text_of(run) : "(" + number(level_of(run)) + ")"; }
};
bool within_two(double a, double b) { return a <= 2 * b && b <= 2 * a; }
Json steps_or_none(bool has, const Run& run) { return has ? Json(text_of(run)) : Json(); }

std::string config_of(const std::string& codec, const Entry& entry) {
  if (entry.feedback[0] == '\0') return "codec=none";
  return codec + " exchange=gather min_numel=1 feedback=" + entry.feedback;
}

}  // namespace

/// Steps of the reference to 1e-16 as expected, and of the engine to where fp32's rounding of gradients as large as zeta is not felt yet.
void least_squares(Report& report, double zeta) {
  const auto expected = [&](std::size_t i) -> Expected {
    const Expected all[] = {{636},  {6176}, {612}, {612}, {645}, {611}, {0, 8.5e-10, 0, true},
                            {3257}, {1086}, {697}, {654}, {642}, {0},   {0}};
    if (zeta != 0 && i == 1) return {0, zeta == 10 ? 12.4 : 1060};
    if (zeta != 0 && i == 2) return {0, zeta == 10 ? 3.81e-2 : 3.61};
    return all[i];
  };
  const LeastSquares problem(16, 20, zeta);
  const double gamma = 1 / (32 * problem.smoothness()), within = zeta < 100 ? 1e-8 : 1e-6;
  std::printf(
      "\nLeast squares, 16 ranks of 20, top-2, zeta = %g: steps to ‖grad f‖² < 1e-16 (engine, and the reference once more: < %g), or "
      "(the level it hovers at; EControl paper: after 20000)\n%-22s %10s %10s %12s %10s %12s\n",
      zeta, within, "method", "expected", "reference", "once more", "engine", "largest |e|");
  for (std::size_t i = 0; i < std::size(kEntries); ++i) {
    const Entry& entry = kEntries[i];
    const Expected want = expected(i);
    Descent fine{.gamma = gamma, .stop = 1e-16}, coarse{.gamma = gamma, .stop = within};
    const bool played = entry.feedback != nullptr, once_more = played && !want.hovers();
    const Run reference = run_reference(problem, entry.method, entry.eta, 1, top(2), fine);
    const Run rough = once_more ? run_reference(problem, entry.method, entry.eta, 1, top(2), coarse) : Run{};
    if (want.hovers()) coarse.most = 6000, coarse.stop = 0;
    const Run engine = played ? run_engine(problem, config_of("codec=topk:density=0.1,select=exact", entry), coarse) : Run{};
    std::printf("%-22s %10s %10s %12s %10s %12s\n", entry.name, want.text().c_str(), want.text(reference).c_str(),
                once_more ? text_of(rough).c_str() : "", played ? text_of(engine).c_str() : "–",
                played ? number(engine.largest_residual).c_str() : "");
    const std::string who = "least squares, zeta " + number(zeta) + ", " + entry.name;
    if (want.hovers()) {
      report.expect(within_two(want.level_of(reference), want.level) && (!played || within_two(want.level_of(engine), want.level)), who);
    } else if (want.diverges()) {
      report.expect(reference.diverged && (!played || engine.reached), who + ": the watchdog");
    } else {
      report.expect(near_count(reference.steps, want.steps), who + ", reference");
      report.expect(!played || near_count(engine.steps, rough.steps), who + ", engine");
    }
    Json row = {{"section", "least_squares"},
                {"zeta", zeta},
                {"method", entry.name},
                {"expected", want.text()},
                {"reference", want.text(reference)},
                {"once_more", steps_or_none(once_more, rough)},
                {"engine", steps_or_none(played, engine)}};
    if (played) report.curve(row, engine, coarse.every);
    report.rows.push_back(row);
  }
}

/// Per-tensor signs have no k: their contraction depends on the message. Two tables: at the rate of the others, and at four times that.
void signs(Report& report) {
  const struct {
    int rate;  ///< gamma·L = 1 / rate
    const char* name;
    Method method;
    double eta;
    const char* feedback;  ///< null: in the reference alone
    double zeta;
    Expected want;
    std::size_t up_to = 0;  ///< the largest of a range of published counts
  } entries[] = {{32, "EF14", Method::ef14, 0, "ef14", 0, {611}},
                 {32, "EF14", Method::ef14, 0, "ef14", 10, {0, 9e-3}},
                 {32, "EF14", Method::ef14, 0, nullptr, 100, {0, 1.0}},
                 {32, "EF21", Method::ef21, 0, "ef21", 10, {609}},
                 {32, "EControl .05", Method::econtrol, 0.05, "econtrol:eta=0.05", 10, {733}},
                 {32, "EControl .1", Method::econtrol, 0.1, nullptr, 10, {665}},
                 {32, "EControl .2", Method::econtrol, 0.2, nullptr, 10, {645}},
                 {32, "EControl auto (.5)", Method::econtrol, 0.5, "econtrol", 10, {638}},
                 {32, "EControl .8", Method::econtrol, 0.8, nullptr, 10, {637}},
                 {32, "EControl 1", Method::econtrol, 1, nullptr, 10, {637}},
                 {32, "EControl 1.2", Method::econtrol, 1.2, "econtrol:eta=1.2", 10, {0}},
                 {8, "EF21", Method::ef21, 0, nullptr, 10, {325}},
                 {8, "EControl .05", Method::econtrol, 0.05, nullptr, 10, {520}, 540},
                 {8, "EControl .2", Method::econtrol, 0.2, nullptr, 10, {1885}},
                 {8, "EControl .8", Method::econtrol, 0.8, nullptr, 10, {227}, 240}};
  int rate = 0;
  for (const auto& entry : entries) {
    if (entry.rate != rate) {
      rate = entry.rate;
      std::printf(
          "\nThe same with scaled signs, rate 1/(%dL): steps to ‖grad f‖² < 1e-16 (engine, and the reference once more: < 1e-8), or "
          "(level)\n"
          "%-18s %5s %10s %10s %12s %10s\n",
          rate, "method", "zeta", "expected", "reference", "once more", "engine");
    }
    const LeastSquares problem(16, 20, entry.zeta);
    Descent fine{.gamma = 1 / (rate * problem.smoothness()), .stop = 1e-16}, coarse = fine;
    coarse.stop = 1e-8;
    const bool played = entry.feedback != nullptr, once_more = played && !entry.want.hovers();
    const Run reference = run_reference(problem, entry.method, entry.eta, 1, scaled_sign, fine);
    const Run rough = once_more ? run_reference(problem, entry.method, entry.eta, 1, scaled_sign, coarse) : Run{};
    if (entry.want.hovers()) coarse.most = 6000, coarse.stop = 0;
    const std::string config = "codec=sign:block=tensor exchange=gather min_numel=1 feedback=";
    const Run engine = played ? run_engine(problem, config + entry.feedback, coarse) : Run{};
    const std::string wanted = entry.want.text() + (entry.up_to == 0 ? "" : "-" + std::to_string(entry.up_to));
    std::printf("%-18s %5g %10s %10s %12s %10s\n", entry.name, entry.zeta, wanted.c_str(), text_of(reference).c_str(),
                once_more ? text_of(rough).c_str() : "", played ? text_of(engine).c_str() : "–");
    const std::string who = std::string("signs, ") + entry.name + ", zeta " + number(entry.zeta);
    if (entry.want.diverges()) {
      report.expect(reference.diverged, who);  // gradients grow with the residual: the watchdog sees no ratio
    } else if (entry.want.hovers()) {
      report.expect(within_two(reference.plateau, entry.want.level) && (!played || within_two(engine.plateau, entry.want.level)), who);
    } else {
      const std::size_t most = std::max(entry.want.steps, entry.up_to);
      const double off = entry.rate == 8 ? 0.05 : 0.02;  // those are published as "about"
      report.expect(double(reference.steps) >= (1 - off) * double(entry.want.steps) && double(reference.steps) <= (1 + off) * double(most),
                    who);
      report.expect(!played || near_count(engine.steps, rough.steps), who + ", engine");
    }
    report.rows.push_back({{"section", "signs"},
                           {"zeta", entry.zeta},
                           {"rate", 1.0 / rate},
                           {"method", entry.name},
                           {"expected", wanted},
                           {"reference", text_of(reference)},
                           {"once_more", steps_or_none(once_more, rough)},
                           {"engine", steps_or_none(played, engine)}});
  }
}

/// gamma = 2^-2 … 2^-10 of 1/L: the fewest steps that a method needs, or the lowest level, of its last quarter. The engine takes the rate
/// that the reference found best.
void best_rates(Report& report, double kappa) {
  const bool round = kappa == 1;
  const auto expected = [&](std::size_t i) -> Expected {
    const Expected isotropic[] = {{71, 0, 2}, {0},         {133},       {133},       {133},       {133},        {0},
                                  {0},        {962, 0, 3}, {387, 0, 3}, {357, 0, 4}, {642, 0, 5}, {2575, 0, 7}, {0}};
    const Expected stretched[] = {{5881}, {0, 0.28}, {0, 1.3e-4}, {5879}, {5881},  {5873}, {0, 8.5e-12, 0, true},
                                  {5888}, {5882},    {5881},      {5881}, {11768}, {0},    {0}};
    return round ? isotropic[i] : stretched[i];
  };
  const double zeta = round ? 0 : 10;
  const LeastSquares problem(16, 20, zeta, kappa);
  std::printf(
      "\nThe same, zeta = %g, curvatures 1 to 1/%g, at the best rate of 2^-2 to 2^-10 of 1/L, or (level) (engine, and the reference once "
      "more: < 1e-8)\n%-22s %10s %10s %8s %12s %10s\n",
      zeta, kappa, "method", "expected", "reference", "rate", "once more", "engine");
  for (std::size_t i = 0; i < std::size(kEntries); ++i) {
    const Entry& entry = kEntries[i];
    const Expected want = expected(i);
    if (round && want.diverges()) continue;  // nothing is told of it
    Descent best{.stop = 1e-16};
    Run reference;
    int power = 0;
    for (int p = 2; p <= 10; ++p) {
      Descent descent{.gamma = std::ldexp(1 / problem.smoothness(), -p), .stop = 1e-16};
      if (reference.reached) descent.most = reference.steps - 1;  // what takes longer is not the best
      const Run run = run_reference(problem, entry.method, entry.eta, 1, top(2), descent);
      const bool lower = !reference.reached && !run.diverged && (power == 0 || run.plateau < reference.plateau);
      if (run.reached || lower) reference = run, best = descent, power = p;
    }
    const bool played = entry.feedback != nullptr && want.steps != 0;
    best.most = Descent{}.most, best.stop = 1e-8;
    const Run rough = played ? run_reference(problem, entry.method, entry.eta, 1, top(2), best) : Run{};
    const Run engine = played ? run_engine(problem, config_of("codec=topk:density=0.1,select=exact", entry), best) : Run{};
    std::printf("%-22s %10s %10s %8s %12s %10s\n", entry.name, want.text().c_str(), power == 0 ? "diverges" : want.text(reference).c_str(),
                power == 0 ? "" : ("2^-" + std::to_string(power)).c_str(), played ? text_of(rough).c_str() : "",
                played ? text_of(engine).c_str() : "–");
    const std::string who = "best rates, curvatures to 1/" + number(kappa) + ", " + entry.name;
    report.expect(want.diverges() ? power == 0
                  : want.hovers()
                      ? power != 0 && within_two(want.level_of(reference), want.level)
                      : reference.reached && near_count(reference.steps, want.steps) && (want.power == 0 || power == want.power),
                  who + ", reference");
    report.expect(!played || (engine.reached && near_count(engine.steps, rough.steps)), who + ", engine");
    report.rows.push_back({{"section", "best_rates"},
                           {"zeta", zeta},
                           {"kappa", kappa},
                           {"method", entry.name},
                           {"rate", power == 0 ? Json() : Json(std::ldexp(1, -power))},
                           {"expected", want.text()},
                           {"reference", power == 0 ? Json("diverges") : Json(want.text(reference))},
                           {"once_more", steps_or_none(played, rough)},
                           {"engine", steps_or_none(played, engine)}});
  }
}

/// Where EF14 hovers at the rate that is best for it: the level falls with (gamma·zeta)².
void best_levels(Report& report) {
  std::printf("\nEF14's level at the best of these rates, 20000 steps\n%-10s %10s %10s %8s %10s\n", "zeta", "expected", "reference", "rate",
              "engine");
  for (const auto& [zeta, want] : {std::pair(10.0, 3.4e-5), {100.0, 4.1e-3}}) {
    const LeastSquares problem(16, 20, zeta);
    double reference = 0;
    int power = 0;
    for (int p = 2; p <= 10; ++p) {
      const Descent descent{.gamma = std::ldexp(1 / problem.smoothness(), -p), .stop = 0};
      const Run run = run_reference(problem, Method::ef14, 0, 1, top(2), descent);
      if (!run.diverged && (power == 0 || run.plateau < reference)) reference = run.plateau, power = p;
    }
    const Descent best{.gamma = std::ldexp(1 / problem.smoothness(), -power), .stop = 0, .most = 10000};  // ten times 1/(gamma·L)
    const Run engine = run_engine(problem, "codec=topk:density=0.1,select=exact exchange=gather min_numel=1 feedback=ef14", best);
    std::printf("%-10g %10.2g %10.2g %8s %10.2g\n", zeta, want, reference, ("2^-" + std::to_string(power)).c_str(), engine.plateau);
    report.expect(within_two(reference, want) && within_two(engine.plateau, want), "EF14's best level, zeta " + number(zeta));
    report.rows.push_back({{"section", "best_levels"},
                           {"zeta", zeta},
                           {"method", "EF14"},
                           {"rate", std::ldexp(1, -power)},
                           {"expected", want},
                           {"reference", reference},
                           {"engine", engine.plateau}});
  }
}

/// h = H = 0 at the beginning: as many steps, but all of a gradient that differs from the others' is owed first.
void starts_from_zero(Report& report) {
  std::printf(
      "\nEControl theory from h = 0, to ‖grad f‖² < 1e-16 (engine: < 1e-8; zeta 100: < 1e-6)\n%-10s %10s %10s %12s %10s %12s %12s\n",
      "zeta", "expected", "reference", "once more", "engine", "largest |e|", "reference");
  const struct {
    double zeta;
    std::size_t steps;
    double residual;
  } entries[] = {{0, 1067, 30}, {10, 1072, 44}, {100, 1107, 382}};
  for (const auto& entry : entries) {
    const LeastSquares problem(16, 20, entry.zeta);
    Descent fine{.gamma = 1 / (32 * problem.smoothness()), .stop = 1e-16}, coarse = fine;
    coarse.stop = entry.zeta < 100 ? 1e-8 : 1e-6;
    const Run reference = run_reference(problem, Method::econtrol, 0.018031, 1, top(2), fine, {.from_zero = true}),
              rough = run_reference(problem, Method::econtrol, 0.018031, 1, top(2), coarse, {.from_zero = true});
    const Run engine = run_engine(
        problem, "codec=topk:density=0.1,select=exact exchange=gather min_numel=1 feedback=econtrol:eta=theory,init=zero", coarse);
    std::printf("%-10g %10zu %10s %12s %10s %12g %12.3g\n", entry.zeta, entry.steps, text_of(reference).c_str(), text_of(rough).c_str(),
                text_of(engine).c_str(), entry.residual, reference.largest_residual);
    const std::string who = "from zero, zeta " + number(entry.zeta);
    report.expect(near_count(reference.steps, entry.steps) && engine.reached && near_count(engine.steps, rough.steps), who);
    report.expect(std::fabs(reference.largest_residual / entry.residual - 1) < 0.02, who + ": the residual");
    report.rows.push_back({{"section", "from_zero"},
                           {"zeta", entry.zeta},
                           {"method", "EControl theory"},
                           {"expected", entry.steps},
                           {"reference", text_of(reference)},
                           {"once_more", text_of(rough)},
                           {"engine", text_of(engine)}});
  }
}

/// What estimates are for: how far ranks are from each other costs no steps. The engine alone, to where fp32 allows it at zeta = 100.
void independence(Report& report) {
  std::printf("\nThe same over the engine, steps to ‖grad f‖² < 1e-6: equal within 5 %%\n%-22s %10s %10s %10s\n", "method, zeta", "0", "10",
              "100");
  for (const Entry& entry : kEntries) {
    if (entry.feedback == nullptr || (entry.method != Method::ef21 && (entry.method != Method::econtrol || entry.eta > 0.1))) continue;
    Run runs[3];
    for (std::size_t i = 0; i < 3; ++i) {
      const LeastSquares problem(16, 20, i == 0 ? 0 : i == 1 ? 10 : 100);
      const Descent descent{.gamma = 1 / (32 * problem.smoothness()), .stop = 1e-6};
      runs[i] = run_engine(problem, config_of("codec=topk:density=0.1,select=exact", entry), descent);
      report.expect(runs[i].reached && std::fabs(double(runs[i].steps) / double(runs[0].steps) - 1) < 0.05,
                    std::string("independence, ") + entry.name);
    }
    std::printf("%-22s %10s %10s %10s\n", entry.name, text_of(runs[0]).c_str(), text_of(runs[1]).c_str(), text_of(runs[2]).c_str());
    report.rows.push_back({{"section", "independence"},
                           {"method", entry.name},
                           {"zeta_0", text_of(runs[0])},
                           {"zeta_10", text_of(runs[1])},
                           {"zeta_100", text_of(runs[2])}});
  }
}

}  // namespace thinwire::bench
