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
                              {"EControl .005", Method::econtrol, 0.005, "econtrol:eta=0.005"},
                              {"EControl theory", Method::econtrol, 0.018031, "econtrol:eta=theory"},
                              {"EControl .05", Method::econtrol, 0.05, "econtrol:eta=0.05"},
                              {"EControl auto", Method::econtrol, 0.1, "econtrol"},
                              {"EControl .2", Method::econtrol, 0.2, "econtrol:eta=0.2"},
                              {"EControl .3", Method::econtrol, 0.3, "econtrol:eta=0.3"}};

std::string config_of(const std::string& codec, const Entry& entry) {
  if (entry.feedback[0] == '\0') return "codec=none";
  return codec + " exchange=gather min_numel=1 feedback=" + entry.feedback;
}

}  // namespace

/// Steps of the reference to 1e-16 as expected, and of the engine to where fp32's rounding of gradients as large as zeta is not felt yet.
void least_squares(Report& report, double zeta) {
  struct Expected {
    std::size_t steps;
    double plateau;
  };
  const auto expected = [&](std::size_t i) -> Expected {
    const std::size_t steps[] = {636, 6176, 612, 612, 645, 611, 3257, 1086, 697, 654, 642, 0};
    const double naive = zeta == 10 ? 12.4 : 1060, ef14 = zeta == 10 ? 3.81e-2 : 3.61;
    if (zeta != 0 && i == 1) return {0, naive};
    if (zeta != 0 && i == 2) return {0, ef14};
    return {steps[i], 0};
  };
  const LeastSquares problem(16, 20, zeta);
  const double gamma = 1 / (32 * problem.smoothness()), within = zeta < 100 ? 1e-8 : 1e-6;
  std::printf(
      "\nLeast squares, 16 ranks of 20, top-2, zeta = %g: steps to ‖grad f‖² < 1e-16 (engine, and the reference once more: < %g), or "
      "(the level it hovers at)\n%-22s %10s %10s %12s %10s %12s\n",
      zeta, within, "method", "expected", "reference", "once more", "engine", "largest |e|");
  for (std::size_t i = 0; i < std::size(kEntries); ++i) {
    const Entry& entry = kEntries[i];
    const Expected want = expected(i);
    Descent fine{.gamma = gamma, .stop = 1e-16}, coarse{.gamma = gamma, .stop = within};
    const bool hovers = want.plateau != 0;
    const Run reference = run_reference(problem, entry.method, entry.eta, 1, top(2), fine);
    const Run rough = hovers ? reference : run_reference(problem, entry.method, entry.eta, 1, top(2), coarse);
    if (hovers) coarse.most = 6000, coarse.stop = 0;
    const Run engine =
        entry.feedback == nullptr ? Run{} : run_engine(problem, config_of("codec=topk:density=0.1,select=exact", entry), coarse);
    const std::string wanted = hovers ? "(" + number(want.plateau) + ")" : want.steps == 0 ? "diverges" : std::to_string(want.steps);
    std::printf("%-22s %10s %10s %12s %10s %12.3g\n", entry.name, wanted.c_str(), text_of(reference).c_str(),
                hovers ? "" : text_of(rough).c_str(), entry.feedback == nullptr ? "–" : text_of(engine).c_str(), engine.largest_residual);
    const std::string who = "least squares, zeta " + number(zeta) + ", " + entry.name;
    const auto within_two = [](double a, double b) { return a <= 2 * b && b <= 2 * a; };
    if (hovers) {
      report.expect(within_two(reference.plateau, want.plateau) && within_two(engine.plateau, want.plateau), who);
    } else if (want.steps == 0) {
      report.expect(reference.diverged && engine.reached, who + ": the watchdog");
    } else {
      report.expect(near_count(reference.steps, want.steps), who + ", reference");
      report.expect(entry.feedback == nullptr || near_count(engine.steps, rough.steps), who + ", engine");
    }
    Json row = {{"section", "least_squares"},
                {"zeta", zeta},
                {"method", entry.name},
                {"reference", text_of(reference)},
                {"engine", entry.feedback == nullptr ? Json() : Json(text_of(engine))}};
    report.curve(row, engine, coarse.every);
    report.rows.push_back(row);
  }
}

/// Per-tensor signs have no k: their contraction depends on the message.
void signs(Report& report) {
  std::printf("\nThe same with scaled signs: steps to ‖grad f‖² < 1e-16 (engine: < 1e-8), or (level)\n%-22s %10s %10s %12s %10s\n",
              "method, zeta", "expected", "reference", "ref. 1e-8", "engine");
  const struct {
    const char* name;
    Method method;
    double eta;
    const char* feedback;
    double zeta;
    std::size_t expected;
    double plateau;
  } entries[] = {{"EF14", Method::ef14, 0, "ef14", 0, 611, 0},
                 {"EF14", Method::ef14, 0, "ef14", 10, 0, 9e-3},
                 {"EF21", Method::ef21, 0, "ef21", 10, 609, 0},
                 {"EControl .05", Method::econtrol, 0.05, "econtrol:eta=0.05", 10, 733, 0},
                 {"EControl auto (.5)", Method::econtrol, 0.5, "econtrol", 10, 638, 0},
                 {"EControl 1.2", Method::econtrol, 1.2, "econtrol:eta=1.2", 10, 0, 0}};
  for (const auto& entry : entries) {
    const LeastSquares problem(16, 20, entry.zeta);
    Descent fine{.gamma = 1 / (32 * problem.smoothness()), .stop = 1e-16}, coarse = fine;
    coarse.stop = 1e-8;
    const Run reference = run_reference(problem, entry.method, entry.eta, 1, scaled_sign, fine),
              rough = run_reference(problem, entry.method, entry.eta, 1, scaled_sign, coarse);
    if (entry.plateau != 0) coarse.most = 6000, coarse.stop = 0;
    const Run engine =
        run_engine(problem, std::string("codec=sign:block=tensor exchange=gather min_numel=1 feedback=") + entry.feedback, coarse);
    const bool diverges = entry.expected == 0 && entry.plateau == 0;
    std::printf("%-16s %5g %10s %10s %12s %10s\n", entry.name, entry.zeta,
                diverges             ? "diverges"
                : entry.plateau != 0 ? ("(" + number(entry.plateau) + ")").c_str()
                                     : std::to_string(entry.expected).c_str(),
                text_of(reference).c_str(), entry.plateau != 0 ? "" : text_of(rough).c_str(), text_of(engine).c_str());
    const std::string who = std::string("signs, ") + entry.name + ", zeta " + number(entry.zeta);
    if (diverges) {
      report.expect(reference.diverged, who);  // gradients grow with the residual: the watchdog sees no ratio
    } else if (entry.plateau != 0) {
      report.expect(engine.plateau < 2 * entry.plateau && engine.plateau > entry.plateau / 2, who);
    } else {
      report.expect(near_count(reference.steps, entry.expected) && near_count(engine.steps, rough.steps), who);
    }
    report.rows.push_back({{"section", "signs"},
                           {"zeta", entry.zeta},
                           {"method", entry.name},
                           {"reference", text_of(reference)},
                           {"engine", text_of(engine)}});
  }
}

/// gamma = 2^-2 … 2^-10 of 1/L: the fewest steps that a method needs. The engine takes the rate that the reference found best.
void best_rates(Report& report, double kappa) {
  struct Expected {
    std::size_t steps;
    int power;  // gamma = 2^-power / L; 0: not stated
  };
  const bool round = kappa == 1;
  const auto expected = [&](std::size_t i) -> Expected {
    const Expected isotropic[] = {{71, 2}, {0, 0},   {133, 0}, {133, 0}, {133, 0}, {133, 0},
                                  {0, 0},  {962, 3}, {387, 3}, {357, 4}, {642, 5}, {2575, 7}};
    const Expected stretched[] = {{5881, 0}, {0, 0},    {0, 0},    {5879, 0}, {5881, 0},  {5873, 0},
                                  {5888, 0}, {5882, 0}, {5881, 0}, {5881, 0}, {11768, 0}, {0, 0}};
    return round ? isotropic[i] : stretched[i];
  };
  const double zeta = round ? 0 : 10;
  const LeastSquares problem(16, 20, zeta, kappa);
  std::printf(
      "\nThe same, zeta = %g, curvatures 1 to 1/%g, at the best rate of 2^-2 to 2^-10 of 1/L (engine, and the reference once more: < "
      "1e-8)\n"
      "%-22s %10s %10s %8s %12s %10s\n",
      zeta, kappa, "method", "expected", "reference", "rate", "once more", "engine");
  for (std::size_t i = 0; i < std::size(kEntries); ++i) {
    const Entry& entry = kEntries[i];
    const Expected want = expected(i);
    if (want.steps == 0) continue;
    Descent best{.stop = 1e-16};
    Run reference;
    int power = 0;
    for (int p = 2; p <= 10; ++p) {
      Descent descent{.gamma = std::ldexp(1 / problem.smoothness(), -p), .stop = 1e-16};
      if (reference.reached) descent.most = reference.steps - 1;  // what takes longer is not the best
      const Run run = run_reference(problem, entry.method, entry.eta, 1, top(2), descent);
      if (run.reached) reference = run, best = descent, power = p;
    }
    best.most = Descent{}.most, best.stop = 1e-8;
    const Run rough = run_reference(problem, entry.method, entry.eta, 1, top(2), best);
    const Run engine =
        entry.feedback == nullptr ? Run{} : run_engine(problem, config_of("codec=topk:density=0.1,select=exact", entry), best);
    std::printf("%-22s %10zu %10s %8s %12s %10s\n", entry.name, want.steps, text_of(reference).c_str(),
                ("2^-" + std::to_string(power)).c_str(), text_of(rough).c_str(), entry.feedback == nullptr ? "–" : text_of(engine).c_str());
    const std::string who = "best rates, curvatures to 1/" + number(kappa) + ", " + entry.name;
    report.expect(reference.reached && near_count(reference.steps, want.steps) && (want.power == 0 || power == want.power),
                  who + ", reference");
    report.expect(entry.feedback == nullptr || (engine.reached && near_count(engine.steps, rough.steps)), who + ", engine");
    report.rows.push_back({{"section", "best_rates"},
                           {"zeta", zeta},
                           {"kappa", kappa},
                           {"method", entry.name},
                           {"rate", std::ldexp(1, -power)},
                           {"expected", want.steps},
                           {"reference", text_of(reference)},
                           {"engine", entry.feedback == nullptr ? Json() : Json(text_of(engine))}});
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
    const auto within_two = [](double a, double b) { return a <= 2 * b && b <= 2 * a; };
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
    const Run reference = run_reference(problem, Method::econtrol, 0.018031, 1, top(2), fine, true),
              rough = run_reference(problem, Method::econtrol, 0.018031, 1, top(2), coarse, true);
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
                           {"engine", text_of(engine)}});
  }
}

/// What estimates are for: how far ranks are from each other costs no steps. The engine alone, to where fp32 allows it at zeta = 100.
void independence(Report& report) {
  std::printf("\nThe same over the engine, steps to ‖grad f‖² < 1e-6: equal within 5 %%\n%-22s %10s %10s %10s\n", "method, zeta", "0", "10",
              "100");
  for (const Entry& entry : kEntries) {
    if (entry.method != Method::ef21 && (entry.method != Method::econtrol || entry.eta > 0.1)) continue;
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
