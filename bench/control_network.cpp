// A small network on label-sorted shards under three optimizers, beside the published losses. Its examples are not those of the published
// runs, which are not told: what can be compared is the order of the methods.

#include "bench/control_network.hpp"

#include <iterator>
#include <limits>

#include "bench/control_report.hpp"

namespace thinwire::bench {
namespace {

struct NetworkRow {
  const char* name;
  int percent;  ///< density
  Optimizer optimizer;
  const char* feedback;   ///< of the config; empty: uncompressed
  double rate;            ///< the best of a grid (--search)
  double loss, accuracy;  ///< published; 0: not told
};

using enum Optimizer;
constexpr NetworkRow kRows[] = {{"uncompressed", 10, sgd, "", 4, 0.0029, 84.5},
                                {"EF14", 10, sgd, "ef14", 4, 0.0028, 83.8},
                                {"EF21", 10, sgd, "ef21", 2, 0.339, 83.4},
                                {"EControl theory", 10, sgd, "econtrol:eta=theory", 2, 0.0057, 84.6},
                                {"EControl auto", 10, sgd, "econtrol", 2, 0.0029, 84},
                                {"EControl .2", 10, sgd, "econtrol:eta=0.2", 2, 0.059, 84.7},
                                {"uncompressed", 10, momentum, "", 0.25, 0.038, 0},
                                {"EF14", 10, momentum, "ef14", 0.25, 0.052, 0},
                                {"EF21", 10, momentum, "ef21", 0.0078125, 0.346, 0},
                                {"EControl theory", 10, momentum, "econtrol:eta=theory", 0.25, 0.0041, 0},
                                {"EControl auto", 10, momentum, "econtrol", 0.25, 0.003, 0},
                                {"DGC", 10, in_hook, "dgc", 2, 0.096, 0},
                                {"uncompressed", 10, adam, "", 0.016, 0.014, 0},
                                {"EF14", 10, adam, "ef14", 0.032, 0.059, 0},
                                {"EF21", 10, adam, "ef21", 0.001, 0.429, 81},
                                {"EControl theory", 10, adam, "econtrol:eta=theory", 0.016, 0.076, 0},
                                {"EControl auto", 10, adam, "econtrol", 0.064, 0.028, 83.4},
                                {"EF14", 1, sgd, "ef14", 2, 0.0128, 84.1},
                                {"EF21", 1, sgd, "ef21", 0.00390625, 3.37, 62},
                                {"EControl theory", 1, sgd, "econtrol:eta=theory", 0.015625, 0.656, 73.7},
                                {"EControl auto", 1, sgd, "econtrol", 0.0625, 0.325, 83.4},
                                {"EControl .02", 1, sgd, "econtrol:eta=0.02", 0.125, 0.305, 84.6},
                                {"EF21-SGDM .01", 1, sgd, "ef21:worker_ema=0.01", 0.0625, 0.162, 84},
                                {"EControl theory + .1", 1, sgd, "econtrol:eta=theory,worker_ema=0.1", 0.5, 0.098, 85.5},
                                {"EControl auto + .1", 1, sgd, "econtrol:worker_ema=0.1", 0.5, 0.057, 85.1},
                                {"EF14", 1, momentum, "ef14", 0.25, 0.0075, 84.8},
                                {"EF21", 1, momentum, "ef21", 0.000488281, 3.2, 60},
                                {"EControl auto", 1, momentum, "econtrol", 0.0078125, 0.327, 84.2},
                                {"EControl auto + .1", 1, momentum, "econtrol:worker_ema=0.1", 0.0625, 0.092, 85.9},
                                {"DGC", 1, in_hook, "dgc", 0.25, 0.211, 85.4},
                                {"EF14", 1, adam, "ef14", 0.064, 0.104, 85.8},
                                {"EF21", 1, adam, "ef21", 6.25e-05, 3.15, 58},
                                {"EControl theory", 1, adam, "econtrol:eta=theory", 0.000125, 1.37, 61},
                                {"EControl auto", 1, adam, "econtrol", 0.0005, 0.534, 78},
                                {"EControl .02", 1, adam, "econtrol:eta=0.02", 0.001, 0.362, 82.6},
                                {"EControl theory + .1", 1, adam, "econtrol:eta=theory,worker_ema=0.1", 0.0005, 0.25, 85.7}};

std::string config_of(const NetworkRow& row) {
  if (row.feedback[0] == '\0') return "codec=none";
  return std::string(row.percent == 10 ? "codec=topk:density=0.1" : "codec=topk:density=0.01") +
         ",select=exact exchange=gather min_numel=1 feedback=" + row.feedback;
}

const char* name_of(Optimizer optimizer) { return optimizer == sgd ? "SGD" : optimizer == adam ? "Adam" : "SGD .9"; }

Trained trained(const NetworkRow& row, double rate) {
  Trained out = train_network(config_of(row), {.optimizer = row.optimizer, .rate = rate}, 0);
  if (!std::isfinite(out.loss)) out.loss = std::numeric_limits<double>::infinity();
  return out;
}

/// The grid: kRates rates, each half of the one before, and kMore beyond the end at which a row's best is.
constexpr int kRates = 11, kMore = 2;
double largest_rate(Optimizer optimizer) { return optimizer == sgd ? 4 : optimizer == adam ? 0.032 : 0.5; }
bool at_the_edge(Optimizer optimizer, double rate) {
  const double largest = std::ldexp(largest_rate(optimizer), kMore), smallest = std::ldexp(largest, 1 - kRates - 2 * kMore);
  return rate > 0.9 * largest || rate < 1.1 * smallest;
}

}  // namespace

void network(Report& report) {
  std::printf(
      "\nA network 32-64-10 on label-sorted shards, 8 ranks, batches of 32, 4000 steps, at the best rate of a grid (*: at its edge): loss "
      "in "
      "training, accuracy in the test\n%-8s %-7s %-26s %10s %8s %10s %10s %10s\n",
      "density%", "with", "method", "published", "", "rate", "loss", "accuracy%");
  const auto run = [&](const NetworkRow& row) {
    const Trained result = trained(row, row.rate);
    const bool edge = at_the_edge(row.optimizer, row.rate);
    std::printf("%-8s %-7s %-26s %10s %8s %10s %10.3g %10.1f\n", row.feedback[0] == '\0' ? "" : std::to_string(row.percent).c_str(),
                name_of(row.optimizer), row.name, number(row.loss).c_str(), row.accuracy == 0 ? "" : number(row.accuracy).c_str(),
                ((edge ? "*" : "") + number(row.rate)).c_str(), result.loss, result.accuracy * 100);
    report.rows.push_back({{"section", "network"},
                           {"density", row.feedback[0] == '\0' ? 1.0 : row.percent / 100.0},
                           {"optimizer", name_of(row.optimizer)},
                           {"method", row.name},
                           {"rate", row.rate},
                           {"at_the_edge", edge},
                           {"expected", row.loss},
                           {"loss", std::isfinite(result.loss) ? Json(result.loss) : Json()},
                           {"accuracy", result.accuracy}});
    return result.loss;
  };
  double losses[std::size(kRows)];
  for (std::size_t i = 0; i < std::size(kRows); ++i) losses[i] = run(kRows[i]);
  const auto loss_of = [&](const char* name, int percent, Optimizer optimizer) {
    std::size_t i = 0;
    while (std::string_view(kRows[i].name) != name || kRows[i].percent != percent || kRows[i].optimizer != optimizer) ++i;
    return losses[i];
  };
  const double dense = loss_of("uncompressed", 10, sgd);
  report.expect(loss_of("EControl auto", 10, sgd) <= 3 * dense, "network: EControl at 10 % within 3 times the uncompressed loss");
  report.expect(loss_of("EF21", 10, sgd) >= 20 * dense, "network: EF21 at 10 % clearly worse");
  for (const Optimizer optimizer : {sgd, momentum})
    report.expect(loss_of("EControl auto + .1", 1, optimizer) < loss_of("EControl auto", 1, optimizer),
                  std::string("network: at 1 % a worker average helps EControl under ") + name_of(optimizer));
}

void search_rates() {
  for (const NetworkRow& row : kRows) {
    std::printf("%d %% %s, %s:", row.percent, name_of(row.optimizer), row.name);
    double best = 0, least = std::numeric_limits<double>::infinity();
    const auto try_rates = [&](double rate, int count, double factor) {
      for (int i = 0; i < count; ++i, rate *= factor) {
        const double loss = trained(row, rate).loss;
        if (loss < least) best = rate, least = loss;
        std::printf("  %g: %.3g", rate, loss);
        std::fflush(stdout);
      }
    };
    const double largest = largest_rate(row.optimizer), smallest = std::ldexp(largest, 1 - kRates);
    try_rates(largest, kRates, 0.5);
    if (best == largest) try_rates(2 * largest, kMore, 2);
    if (best == smallest) try_rates(smallest / 2, kMore, 0.5);
    std::printf("  best: %g%s\n", best, at_the_edge(row.optimizer, best) ? ", at the edge" : "");
  }
}

}  // namespace thinwire::bench
