// What is not compressed: tensors that never are, dense steps (start, flush), the dense rule of exchange=auto, and the way in and out.

#include <gtest/gtest.h>

#include <set>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

using Way = Oracle::Way;

std::set<std::string> names_of(const ReducerState& state, const std::string& parameter) {
  std::set<std::string> names;
  for (const auto& [name, values] : state.parameters.at(parameter)) names.insert(name);
  return names;
}

const std::vector<Parameter> kModel = {{"w", {6, 10}}, {"bias", {6}}, {"small", {2, 3}}};
const std::vector<std::size_t> kNumel = {60, 6, 6};

Oracle::Step oracle_step(const Scenario& s, int t, std::vector<Way> way, std::vector<std::size_t> k) {
  Oracle::Step step{.way = std::move(way), .k = std::move(k), .buckets = {{0, 1, 2}}};
  for (int r = 0; r < s.world; ++r) step.grad.push_back({s.grad(t, r, 0), s.grad(t, r, 1), s.grad(t, r, 2)});
  return step;
}

TEST(ReducerDense, StateNamesFollowTheFeedbackAndTheTensor) {
  const auto state_of = [](const std::string& config) {
    return play({.world = 2, .config = config, .parameters = kModel, .steps = 2, .grad = numbers(real_number, 1, kModel)}).state[1];
  };
  const ReducerState dgc = state_of("codec=topk:density=0.1,select=exact feedback=dgc exchange=gather min_numel=7");
  EXPECT_EQ(names_of(dgc, "w"), (std::set<std::string>{"momentum", "accumulated"}));
  EXPECT_EQ(names_of(dgc, "bias"), std::set<std::string>{"momentum"});
  EXPECT_EQ(names_of(dgc, "small"), std::set<std::string>{"momentum"});
  const ReducerState sampled = state_of("codec=topk:density=0.1 feedback=dgc exchange=gather min_numel=6");
  EXPECT_EQ(names_of(sampled, "w"), (std::set<std::string>{"momentum", "accumulated", "threshold"}));
  EXPECT_EQ(names_of(sampled, "small"), (std::set<std::string>{"momentum", "accumulated", "threshold"}));
  EXPECT_EQ(sampled.parameters.at("w").at("threshold").size(), 1u);
  const ReducerState ef = state_of("codec=topk:density=0.1,select=exact feedback=ef14 exchange=gather min_numel=7");
  EXPECT_EQ(names_of(ef, "w"), std::set<std::string>{"residual"});
  EXPECT_EQ(names_of(ef, "bias"), std::set<std::string>{});
  EXPECT_EQ(names_of(state_of("codec=topk:density=0.1,select=exact exchange=gather min_numel=7"), "w"), std::set<std::string>{});
  EXPECT_EQ(names_of(state_of("codec=none"), "w"), std::set<std::string>{});
}

TEST(ReducerDense, ReasonsAreGiven) {
  std::vector<Parameter> model = kModel;
  model.push_back({"none", {3, 0}});
  Scenario s{.world = 2,
             .config = "codec=topk:density=0.1,select=exact feedback=dgc exchange=gather min_numel=7",
             .parameters = model,
             .steps = 1,
             .grad = numbers(real_number, 1, model)};
  const Stats stats = play(s).stats[0];
  EXPECT_EQ(stats.parameters[0].reason, "");
  EXPECT_TRUE(stats.parameters[0].compressed);
  EXPECT_EQ(stats.parameters[0].density, 0.1);
  EXPECT_EQ(stats.parameters[0].kept, 6u);
  EXPECT_EQ(stats.parameters[1].reason, "fewer than two dimensions");
  EXPECT_EQ(stats.parameters[2].reason, "fewer than min_numel=7 elements");
  EXPECT_FALSE(stats.parameters[3].compressed);
  EXPECT_FALSE(stats.parameters[3].reason.empty());
  for (int p = 1; p < 4; ++p) {
    EXPECT_EQ(stats.parameters[std::size_t(p)].kept, 0u);
    EXPECT_EQ(stats.parameters[std::size_t(p)].density, 1.0);
  }
}

// Dense tensors under DGC and whole dense steps are dense momentum SGD: the mean that comes back is the momentum of the mean gradient.
TEST(ReducerDense, DenseStepsAreMomentumSgd) {
  for (const bool nesterov : {false, true})
    for (const int world : {1, 2, 3, 4, 7}) {
      const int steps = 20;
      Scenario s{.world = world,
                 .config = std::string("codec=topk:density=0.1,select=exact feedback=dgc:momentum=0.9,nesterov=") + (nesterov ? "1" : "0") +
                           " exchange=gather min_numel=7 start_step=" + std::to_string(steps),
                 .parameters = kModel,
                 .steps = steps,
                 .grad = numbers(real_number, 3, kModel)};
      const Outcome out = play(s);
      expect_replicas_agree(out);
      for (std::uint32_t p = 0; p < 3; ++p) {
        std::vector<double> momentum(kNumel[p]);
        for (int t = 0; t < steps; ++t)
          for (std::size_t i = 0; i < kNumel[p]; ++i) {
            double g = 0;
            for (int r = 0; r < world; ++r) g += double(s.grad(t, r, p)[i]);
            g /= world;
            momentum[i] = 0.9 * momentum[i] + g;
            const double expected = nesterov ? g + 0.9 * momentum[i] : momentum[i];
            // Each step rounds each rank's u and the sum: 2^-24 of values below 200, shrinking by 0.9 per step: about 10 + world of them.
            EXPECT_NEAR(out.mean[std::size_t(t)][0][p][i], expected, 200 * 6e-8 * (10 + world)) << "world " << world << " step " << t;
          }
      }
      for (const float x : out.array(0, "w", "accumulated")) EXPECT_EQ(x, 0.0f);
      EXPECT_EQ(out.stats[0].parameters[0].residual_norm, 0.0);
      EXPECT_EQ(out.stats[0].parameters[0].reason, "a dense step");
    }
}

// Invariant 1: everything is sent and nothing masked: at world 1 bit for bit torch's order of operations, u = m·u + g.
TEST(ReducerDense, DensityOneWithoutMaskIsMomentumSgdToTheBitAtWorldOne) {
  Scenario s{.world = 1,
             .config = "codec=topk:density=1,select=exact feedback=dgc:momentum=0.9,mask=0 exchange=gather min_numel=1",
             .parameters = {{"w", {5, 40}}},
             .steps = 300,
             .grad = nullptr};
  s.grad = numbers(real_number, 9, s.parameters);
  const Outcome out = play(s);
  Vec momentum(200);
  for (int t = 0; t < s.steps; ++t) {
    const Vec g = s.grad(t, 0, 0);
    for (std::size_t i = 0; i < 200; ++i) {
      const float decayed = 0.9f * momentum[i];
      momentum[i] = decayed + g[i];
    }
    ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][0], momentum)) << t;
  }
}

// Invariant 2: with masking every momentum restarts at once, which leaves plain SGD.
TEST(ReducerDense, DensityOneWithMaskIsPlainSgd) {
  Scenario s{.world = 1,
             .config = "codec=topk:density=1,select=exact feedback=dgc:momentum=0.9 exchange=gather min_numel=1",
             .parameters = {{"w", {5, 40}}},
             .steps = 20,
             .grad = nullptr};
  s.grad = numbers(real_number, 10, s.parameters);
  const Outcome out = play(s);
  for (int t = 0; t < s.steps; ++t) ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][0], s.grad(t, 0, 0)));
}

// Dense start, compressed steps, a flush in the middle, compressed again: the oracle step by step; residuals empty after every dense step.
TEST(ReducerDense, SwitchingEitherWayFollowsTheOracle) {
  for (const std::string feedback : {"dgc:momentum=0.9", "dgc:momentum=0.9,nesterov=1", "ef14:decay=0.5", "none"})
    for (const int world : {1, 2, 3, 7}) {
      Scenario s{.world = world,
                 .config = "codec=topk:density=0.1,select=exact feedback=" + feedback + " exchange=gather min_numel=7 start_step=3",
                 .parameters = kModel,
                 .steps = 12,
                 .grad = numbers(real_number, 4, kModel)};
      std::vector<std::vector<ReducerState>> states(12, std::vector<ReducerState>(std::size_t(world)));
      s.before_step = [](GradientReducer& reducer, int step, int) {
        if (step == 7) reducer.flush();
      };
      s.after_step = [&](GradientReducer& reducer, int step, int rank) { states[std::size_t(step)][std::size_t(rank)] = reducer.state(); };
      const Outcome out = play(s);
      const bool dgc = feedback[0] == 'd', none = feedback == "none";
      Oracle oracle(world, kNumel,
                    {.feedback = dgc    ? Oracle::Feedback::dgc
                                 : none ? Oracle::Feedback::none
                                        : Oracle::Feedback::ef14,
                     .rate = dgc ? 0.9f : 0.5f,
                     .nesterov = feedback.find("nesterov") != std::string::npos});
      for (int t = 0; t < 12; ++t) {
        const bool dense = t < 3 || t == 7;
        const auto mean = oracle.step(oracle_step(s, t, {dense ? Way::dense : Way::sparse, Way::never, Way::never}, {6, 0, 0}));
        for (std::uint32_t p = 0; p < 3; ++p)
          ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][p], mean[p])) << feedback << " world " << world << " step " << t << " " << p;
        for (int r = 0; r < world; ++r) {
          const auto& arrays = states[std::size_t(t)][std::size_t(r)].parameters.at("w");
          if (none) continue;
          const Vec& residual = arrays.at(dgc ? "accumulated" : "residual");
          ASSERT_TRUE(same_values(residual, oracle.residual(r, 0)));
          if (dense) { ASSERT_EQ(residual, Vec(60, 0.0f)); }
          if (dgc) { ASSERT_TRUE(same_values(arrays.at("momentum"), oracle.momentum(r, 0))); }
        }
      }
    }
}

// Invariant 8: a dense step masks nothing, so the momentum goes on: dense, then compressed at density 1 without mask, is dense throughout.
TEST(ReducerDense, TheSwitchKeepsTheMeanMomentum) {
  Scenario s{.world = 4,
             .config = "codec=topk:density=1,select=exact feedback=dgc:momentum=0.5,mask=0 exchange=gather min_numel=7 start_step=3",
             .parameters = kModel,
             .steps = 6,
             .grad = numbers(dyadic_number, 6, kModel)};
  const Outcome out = play(s);
  Vec momentum(60);
  for (int t = 0; t < 6; ++t) {
    for (std::size_t i = 0; i < 60; ++i) {
      float sum = 0;
      for (int r = 0; r < 4; ++r) sum += s.grad(t, r, 0)[i];
      momentum[i] = 0.5f * momentum[i] + sum / 4;  // exact: dyadic
    }
    EXPECT_TRUE(same_values(out.mean[std::size_t(t)][2][0], momentum)) << t;
  }
}

// exchange=auto: dense where capacity · (N − 1) >= 2 (N − 1)/N · bytes. u32 indices, fp32 values: capacity 4 + 8k, so at world 2 the
// boundary is 4 + 8k = 4n.
TEST(ReducerDense, TheDenseRuleAtItsBoundary) {
  const auto stats_of = [](int world, std::size_t rows, std::size_t columns, std::size_t k, const std::string& exchange,
                           DType dtype = DType::fp32) {
    const double density = (double(k) - 0.5) / double(rows * columns);
    Scenario s{
        .world = world,
        .config = "codec=topk:select=exact,index=u32,density=" + std::to_string(density) + " feedback=dgc min_numel=1 exchange=" + exchange,
        .parameters = {{"w", {rows, columns}}},
        .steps = 2,
        .dtype = dtype,
        .grad = nullptr};
    s.grad = numbers(dyadic_number, 1, s.parameters);
    return play(s).stats[0];
  };
  for (const std::size_t k : {1, 4, 20, 100}) {
    const Stats at = stats_of(2, 1, 2 * k + 1, k, "auto");
    EXPECT_FALSE(at.parameters[0].compressed) << k;
    EXPECT_EQ(at.parameters[0].reason, "dense sends no more bytes at this density and world");
    EXPECT_EQ(at.parameters[0].kept, 0u);
    EXPECT_TRUE(stats_of(2, 1, 2 * k + 2, k, "auto").parameters[0].compressed) << k;
    EXPECT_TRUE(stats_of(2, 1, 2 * k + 1, k, "gather").parameters[0].compressed) << k;
  }
  // World 4: 4 + 8k >= 2/4 · 4n, so from n = 4k + 2 downwards it is dense. With 2-byte gradients from n = 8k + 4.
  EXPECT_FALSE(stats_of(4, 1, 42, 10, "auto").parameters[0].compressed);
  EXPECT_TRUE(stats_of(4, 1, 43, 10, "auto").parameters[0].compressed);
  EXPECT_FALSE(stats_of(4, 1, 84, 10, "auto", DType::bf16).parameters[0].compressed);
  EXPECT_TRUE(stats_of(4, 1, 85, 10, "auto", DType::bf16).parameters[0].compressed);
  // World 1 sends nothing either way; "at least as much" holds, and gather never gives way.
  EXPECT_FALSE(stats_of(1, 1, 1000, 10, "auto").parameters[0].compressed);
  EXPECT_TRUE(stats_of(1, 1, 1000, 10, "gather").parameters[0].compressed);
}

// A tensor that the rule keeps dense is still the recursion with nothing left out, beside others' payloads, large or small.
TEST(ReducerDense, TheRuleFollowsTheOracle) {
  for (const std::size_t columns : {std::size_t(10), std::size_t(4000)}) {
    // Warm-up through densities at which w is dense at world 3 (8 bytes · 0.9 n · 2 >= 16/3 n) and later is not.
    const std::vector<Parameter> model = {{"w", {6, columns}}, {"bias", {6}}, {"small", {2, 3}}};
    Scenario s{
        .world = 3,
        .config =
            "codec=topk:density=0.05,select=exact,index=u32 feedback=dgc:momentum=0.9 min_numel=7 policy=warmup:densities=0.9/0.2,steps=2",
        .parameters = model,
        .steps = 7,
        .grad = numbers(real_number, 12, model)};
    std::vector<Stats> stats(7);
    s.after_step = [&](GradientReducer& reducer, int step, int rank) {
      if (rank == 0) stats[std::size_t(step)] = reducer.stats();
    };
    const Outcome out = play(s);
    expect_replicas_agree(out);
    Oracle oracle(3, {6 * columns, 6, 6}, {.feedback = Oracle::Feedback::dgc, .rate = 0.9f});
    const double densities[] = {0.9, 0.9, 0.2, 0.2, 0.05, 0.05, 0.05};
    for (int t = 0; t < 7; ++t) {
      const bool dense = t < 2;
      const auto k = std::size_t(std::ceil(densities[t] * 6 * double(columns) - 1e-9));
      EXPECT_EQ(stats[std::size_t(t)].parameters[0].compressed, !dense) << t;
      EXPECT_EQ(stats[std::size_t(t)].parameters[0].density, dense ? 1.0 : densities[t]);
      EXPECT_EQ(stats[std::size_t(t)].parameters[0].kept, dense ? 0 : k);
      const auto mean = oracle.step(oracle_step(s, t, {dense ? Way::dense : Way::sparse, Way::never, Way::never}, {k, 0, 0}));
      for (std::uint32_t p = 0; p < 3; ++p) ASSERT_TRUE(same_values(out.mean[std::size_t(t)][1][p], mean[p])) << t << " " << p;
    }
  }
}

// The warm-up counts steps after start_step; a flush uses one of them up; the threshold is kept through a dense step and other densities.
TEST(ReducerDense, WarmUpIsVisibleStepByStep) {
  const std::vector<Parameter> model = {{"w", {100, 100}}};
  Scenario s{
      .world = 2,
      .config =
          "codec=topk:density=0.01 feedback=dgc exchange=gather min_numel=7 start_step=2 policy=warmup:densities=0.25/0.0625/0.001,steps=2",
      .parameters = model,
      .steps = 9,
      .grad = numbers(real_number, 21, model)};
  std::vector<Stats> stats(9);
  std::vector<std::uint64_t> bytes(9);
  Vec thresholds(9);
  s.before_step = [](GradientReducer& reducer, int step, int) {
    if (step == 7) reducer.flush();
  };
  s.after_step = [&](GradientReducer& reducer, int step, int rank) {
    if (rank != 0) return;
    stats[std::size_t(step)] = reducer.stats();
    thresholds[std::size_t(step)] = reducer.state().parameters.at("w").at("threshold").at(0);
  };
  play(s);
  const double densities[] = {1, 1, 0.25, 0.25, 0.0625, 0.0625, 0.01, 1, 0.01};  // 0.001 is below the final density
  for (std::size_t t = 0; t < 9; ++t) {
    EXPECT_EQ(stats[t].parameters[0].density, densities[t]) << t;
    EXPECT_EQ(stats[t].step, t + 1);
    const bool dense = densities[t] == 1;
    EXPECT_EQ(stats[t].parameters[0].reason, dense ? "a dense step" : "");
    const double k = densities[t] * 10000;
    if (dense) {
      EXPECT_EQ(stats[t].parameters[0].kept, 0u);
    } else {  // capacity is 1.25 k; the sample of 4096 of 10^4 elements keeps the count near k (six standard deviations at k = 100: ±60 %)
      EXPECT_LE(double(stats[t].parameters[0].kept), 1.25 * k);
      EXPECT_GE(double(stats[t].parameters[0].kept), 0.4 * k);
    }
    const std::uint64_t sent = stats[t].payload_bytes - (t == 0 ? 0 : stats[t - 1].payload_bytes);
    if (dense) {
      EXPECT_EQ(sent, 4 * 10001u) << t;
    } else {
      EXPECT_LT(sent, 4 * 10001u * 0.8) << t;
    }
  }
  EXPECT_EQ(thresholds[0], 0.0f);
  EXPECT_GT(thresholds[6], 0.0f);
  EXPECT_EQ(thresholds[7], thresholds[6]);
}

}  // namespace
}  // namespace thinwire::test
