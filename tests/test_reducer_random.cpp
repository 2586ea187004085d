// Random runs against the oracle: feedback, wire, gradient type, world, buckets that change every step, dense starts, flushes, accidents,
// joined ranks, scalers and both units of the verdict, all at once. Seeds are fixed; a failure names its own.

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

using Way = Oracle::Way;

struct Dice {
  std::uint64_t seed, rolls = 0;
  std::size_t below(std::size_t n) { return std::size_t(draw(seed, 1, 2, 3, rolls++) % n); }
  bool once_in(std::size_t n) { return below(n) == 0; }
};

void play_and_compare(std::uint64_t seed) {
  Dice dice{seed};
  const int world = int(1 + dice.below(4)), steps = 9;
  std::vector<Parameter> model;
  std::vector<std::size_t> numel;
  for (std::size_t p = 0, n = 1 + dice.below(6); p < n; ++p) {
    const std::size_t rows = 1 + dice.below(40), columns = dice.once_in(8) ? 900 : dice.below(60);
    std::vector<std::size_t> shape = {rows, columns};
    if (dice.once_in(3)) shape = {rows * columns};
    model.push_back({"p" + std::to_string(p), shape});
    numel.push_back(rows * columns);
  }
  const DType dtypes[] = {DType::fp32, DType::fp32, DType::bf16, DType::fp16};
  const DType dtype = dtypes[dice.below(4)], wire = dtypes[1 + dice.below(3)];
  const std::size_t kind = dice.below(5), min_numel = dice.below(2) * 200;
  Oracle::Options options{.wire = wire, .dtype = dtype, .step_verdict = dice.once_in(3)};
  std::string feedback = "none";
  if (kind == 1) feedback = "ef14", options.feedback = Oracle::Feedback::ef14, options.rate = 1;
  if (kind == 2) feedback = "ef14:decay=0.3", options.feedback = Oracle::Feedback::ef14, options.rate = 0.3f;
  if (kind >= 3) {
    options.feedback = Oracle::Feedback::dgc;
    options.rate = 0.7f;
    options.nesterov = dice.once_in(2);
    options.mask = !dice.once_in(3);
    feedback = std::string("dgc:momentum=0.7,nesterov=") + (options.nesterov ? "1" : "0") + ",mask=" + (options.mask ? "1" : "0");
  }
  const double density = 0.01 * double(1 + dice.below(30));
  const int start = dice.once_in(2) ? int(dice.below(4)) : 0, flush = dice.once_in(2) ? int(dice.below(9)) : -1;
  const std::string index[] = {"auto", "u32", "u16", "bitmap"};

  Scenario s{.world = world, .config = "", .parameters = model, .steps = steps, .dtype = dtype, .grad = nullptr};
  s.config = "codec=topk:select=exact,density=" + std::to_string(density) + ",wire=" + to_string(wire) + ",index=" + index[dice.below(4)] +
             " feedback=" + feedback + " exchange=gather min_numel=" + std::to_string(min_numel) + " start_step=" + std::to_string(start);
  s.reducer.step_verdict = options.step_verdict;
  s.reducer.inline_queue = dice.once_in(3);
  SCOPED_TRACE("seed " + std::to_string(seed) + ": " + s.config + " world " + std::to_string(world) + " " + to_string(dtype));

  std::vector<std::vector<Ids>> buckets(steps);
  std::vector<std::vector<bool>> joined(steps, std::vector<bool>(std::size_t(world)));
  std::vector<float> scale(steps, 1.0f);
  std::set<std::array<int, 3>> accidents;  // step, rank, parameter
  for (std::size_t t = 0; t < std::size_t(steps); ++t) {
    Ids order(model.size());
    for (std::size_t p = 0; p < order.size(); ++p) order[p] = std::uint32_t(p);
    for (std::size_t p = order.size(); p > 1; --p) std::swap(order[p - 1], order[dice.below(p)]);
    for (const std::uint32_t p : order) {
      if (buckets[t].empty() || dice.once_in(2)) buckets[t].emplace_back();
      buckets[t].back().push_back(p);
    }
    if (dice.once_in(4)) accidents.insert({int(t), int(dice.below(std::size_t(world))), int(dice.below(model.size()))});
    for (std::size_t r = 0; r < std::size_t(world); ++r) joined[t][r] = dice.once_in(10);
    if (dtype == DType::fp32 && dice.once_in(2)) scale[t] = 1024;
  }
  s.buckets = [&](int t) { return buckets[std::size_t(t)]; };
  s.options = [&](int t, int r) {
    return ReduceOptions{.loss_scale = scale[std::size_t(t)], .joined = joined[std::size_t(t)][std::size_t(r)]};
  };
  s.before_step = [&](GradientReducer& reducer, int t, int) {
    if (t == flush) reducer.flush();
  };
  s.grad = [&](int t, int r, std::uint32_t p) {
    Vec g(numel[p]);
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = as_type(real_number(seed, t, r, p, i), dtype) * scale[std::size_t(t)];
    if (!g.empty() && accidents.contains({t, r, int(p)})) g[g.size() / 3] = std::numeric_limits<float>::infinity();
    return g;
  };
  const Outcome out = play(s);
  expect_replicas_agree(out);

  Oracle oracle(world, numel, options);
  bool flushing = false, bad = false;  // a flushed step that was bad is made again
  for (int t = 0; t < steps; ++t) {
    flushing = t == flush || (flushing && bad);
    Oracle::Step step{.buckets = buckets[std::size_t(t)], .joined = joined[std::size_t(t)], .scale = scale[std::size_t(t)]};
    for (std::size_t p = 0; p < model.size(); ++p) {
      const bool never = model[p].shape.size() < 2 || numel[p] < min_numel || numel[p] == 0;
      step.way.push_back(never ? Way::never : t < start || flushing ? Way::dense : Way::sparse);
      // The density as it was printed: six digits.
      step.k.push_back(std::size_t(std::max(1.0, std::ceil(std::stod(std::to_string(density)) * double(numel[p]) - 1e-9))));
    }
    for (int r = 0; r < world; ++r) {
      auto& g = step.grad.emplace_back();
      for (std::uint32_t p = 0; p < model.size(); ++p) g.push_back(s.grad(t, r, p));
    }
    const auto mean = oracle.step(step);
    bad = std::any_of(mean.begin(), mean.end(),
                      [](const Vec& m) { return std::any_of(m.begin(), m.end(), [](float x) { return std::isnan(x); }); });
    for (std::uint32_t p = 0; p < model.size(); ++p)
      ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][p], mean[p])) << "step " << t << " parameter " << p;
  }
  for (int r = 0; r < world; ++r)
    for (std::uint32_t p = 0; p < model.size(); ++p)
      for (const auto& [name, values] : out.state[std::size_t(r)].parameters.at(model[p].name))
        ASSERT_TRUE(same_values(values, name == "momentum" ? oracle.momentum(r, p) : oracle.residual(r, p)))
            << r << " " << p << "." << name;
  ASSERT_EQ(out.stats[0].nonfinite_steps, std::uint64_t(oracle.bad_steps()));
}

TEST(ReducerRandom, RunsFollowTheOracle) {
  for (std::uint64_t seed = 1; seed <= 40 && !HasFailure(); ++seed) play_and_compare(seed);
}

TEST(ReducerRandom, SlowManyMoreRuns) {
  for (std::uint64_t seed = 41; seed <= 250 && !HasFailure(); ++seed) play_and_compare(seed);
}

}  // namespace
}  // namespace thinwire::test
