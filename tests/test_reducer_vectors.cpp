// Worked examples of Deep Gradient Compression end to end: every number below was computed by hand-checkable arithmetic in exact fp32.

#include <gtest/gtest.h>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

// n = 8, k = 2, N = 2, m = 0.5.
const std::vector<std::vector<Vec>> kGrad = {{{1, -2, 3, -4, .5f, .25f, -.125f, 8}, {-1, 2, -3, 4, 5, -.25f, .125f, 0}},
                                             {{.5f, 1, -1, 2, -6, 0, .25f, -.5f}, {2, -2, 1, -1, .5f, 7, 0, 1}},
                                             {{-1, .5f, 2, 1, 1, -1, 4, .25f}, {0, 3, -.5f, .25f, -2, 1, -1, -8}}};

Scenario scenario(const std::string& dgc) {
  return {.world = 2,
          .config = "codec=topk:density=0.25,select=exact feedback=dgc:momentum=0.5" + dgc + " exchange=gather min_numel=1",
          .parameters = {{"w", {2, 4}}},
          .steps = 3,
          .grad = [](int step, int rank, std::uint32_t) { return kGrad[std::size_t(step)][std::size_t(rank)]; }};
}

void expect_means(const Outcome& out, const std::vector<Vec>& expected) {
  for (std::size_t t = 0; t < 3; ++t) {
    if (expected[t].empty()) continue;
    for (std::size_t r = 0; r < 2; ++r) EXPECT_TRUE(same_values(out.mean[t][r][0], expected[t])) << "step " << t << " rank " << r;
  }
}

TEST(ReducerVectors, DgcPlain) {
  for (const bool inline_queue : {false, true}) {
    Scenario s = scenario("");
    s.reducer.inline_queue = inline_queue;
    const Outcome out = play(s);
    // Coordinate 3 at step 0 and coordinate 2 at step 1 cancel to 0.
    expect_means(out, {{0, 0, 0, 0, 2.5f, 0, 0, 4}, {0, 0, 0, 0, -2.625f, 3.3125f, 0, 0}, {0, 1.75f, 0, 2, 0, 0, 2.078125f, -3.25f}});
    EXPECT_TRUE(same_values(out.array(0, "w", "momentum"), {-.5f, .5f, 2, 0, 1, -.9375f, 0, 0}));
    EXPECT_TRUE(same_values(out.array(0, "w", "accumulated"), {1.5f, -1.5f, 2, 0, 1, -.5625f, 0, -.5f}));
    EXPECT_TRUE(same_values(out.array(1, "w", "momentum"), {.75f, 0, -.5f, -.25f, -1.75f, 1, -.96875f, 0}));
    EXPECT_TRUE(same_values(out.array(1, "w", "accumulated"), {1.25f, 0, -.5f, -1.25f, -1.25f, 1, -.78125f, 0}));
    EXPECT_EQ(out.stats[0].parameters[0].kept, 2u);
  }
}

TEST(ReducerVectors, DgcWithoutMaskingBreaksTheTieToTheLowestIndex) {
  const Outcome out = play(scenario(",mask=0"));
  expect_means(out, {{}, {}, {0, 0, 0, 0, 0, 2.21875f, 2.078125f, -.5f}});
  EXPECT_TRUE(same_values(out.array(0, "w", "accumulated"), {1.5f, -1.5f, 2.25f, 1, -1.875f, -.5625f, 0, 0}));
  EXPECT_TRUE(same_values(out.array(1, "w", "accumulated"), {1.25f, 3.5f, -.75f, 1.75f, 2.5f, 0, -.78125f, 0}));
  EXPECT_TRUE(same_values(out.array(1, "w", "momentum"), {.75f, 2.5f, -.75f, .75f, -.5f, 4.4375f, -.96875f, -7.5f}));
}

TEST(ReducerVectors, DgcNesterov) {
  const Outcome out = play(scenario(",nesterov=1"));
  expect_means(out,
               {{0, 0, 0, 0, 3.75f, 0, 0, 6}, {0, 0, 0, 0, -4.0625f, 5.03125f, 0, 0}, {0, 2.375f, 0, 2.5f, 0, 0, 3.1015625f, -5.125f}});
  EXPECT_TRUE(same_values(out.array(0, "w", "accumulated"), {1.25f, -1.25f, 3, 0, 1.5f, -1.03125f, 0, -.5f}));
  EXPECT_TRUE(same_values(out.array(0, "w", "momentum"), {-.25f, .25f, 1, 0, .5f, -.46875f, 0, 0}));
}

// The oracle of the other tests against the same numbers, so that it is itself tested.
TEST(ReducerVectors, TheOracleGivesThemToo) {
  Oracle oracle(2, {8}, {.feedback = Oracle::Feedback::dgc, .rate = 0.5f});
  const std::vector<Vec> expected = {
      {0, 0, 0, 0, 2.5f, 0, 0, 4}, {0, 0, 0, 0, -2.625f, 3.3125f, 0, 0}, {0, 1.75f, 0, 2, 0, 0, 2.078125f, -3.25f}};
  for (std::size_t t = 0; t < 3; ++t) {
    const auto mean =
        oracle.step({.grad = {{kGrad[t][0]}, {kGrad[t][1]}}, .way = {Oracle::Way::sparse}, .k = {2}, .buckets = {{0}}, .joined = {}});
    EXPECT_TRUE(same_values(mean[0], expected[t]));
  }
  EXPECT_TRUE(same_values(oracle.momentum(1, 0), {.75f, 0, -.5f, -.25f, -1.75f, 1, -.96875f, 0}));
  EXPECT_TRUE(same_values(oracle.residual(0, 0), {1.5f, -1.5f, 2, 0, 1, -.5625f, 0, -.5f}));
}

// Every coordinate of a constant gradient of equal magnitudes is sent within ceil(n/k) + 1 steps.
TEST(ReducerVectors, NothingStarves) {
  const int n = 30, k = 4, steps = (n + k - 1) / k + 1;
  const Outcome out = play({.world = 1,
                            .config = "codec=topk:density=0.13,select=exact feedback=dgc exchange=gather min_numel=1",
                            .parameters = {{"w", {5, 6}}},
                            .steps = steps,
                            .grad = [](int, int, std::uint32_t) { return Vec(30, -0.5f); }});
  std::vector<bool> seen(n);
  for (const auto& step : out.mean)
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = seen[i] || step[0][0][i] != 0;
  EXPECT_EQ(std::count(seen.begin(), seen.end(), true), n);
}

// Invariant 12 under noise: k of n coordinates are sent at a step, so a coordinate's mean gap is n/k = 1/density. Between a first and a
// last send in T steps lie all but the waits at the two ends, together two gaps on average (a fresh one, and what is left of one); three
// are allowed. And nobody starves: what waits is a random walk that is sent where it leaves ±tau, which takes longer than t with
// probability (4/pi) exp(-pi^2/8 · t/gap), so that 15 gaps are seen once in 10^8 waits; there are 20,000 here.
TEST(ReducerVectors, UnderNoiseTheMeanGapIsOneOverTheDensity) {
  constexpr std::size_t n = 1000, k = 10;
  constexpr int kSteps = 2000;
  constexpr double kGap = double(n) / k, kGaps = kSteps / kGap;
  for (const char* config : {"codec=topk:density=0.01,select=exact feedback=dgc:momentum=0.5 exchange=gather min_numel=1",
                             "codec=topk:density=0.01,select=exact feedback=ef14 exchange=gather min_numel=1"}) {
    SCOPED_TRACE(config);
    Scenario s{.world = 1, .config = config, .parameters = {{"w", {40, 25}}}, .steps = kSteps, .grad = nullptr};
    s.grad = [](int step, int, std::uint32_t) {
      Vec g(n);
      for (std::size_t i = 0; i < n; ++i) g[i] = float(std::int32_t(draw(5, std::uint64_t(step), 0, 0, i) >> 32)) * 0x1p-31f;
      return g;
    };
    const Outcome out = play(s);
    std::vector<int> first(n, -1), last(n, -1);
    double between = 0, gaps = 0;
    int longest = 0;
    for (int t = 0; t < kSteps; ++t) {
      const Vec& sent = out.mean[std::size_t(t)][0][0];
      for (std::size_t i = 0; i < n; ++i) {
        const bool end = t == kSteps - 1;
        if (sent[i] != 0 || end) longest = std::max(longest, t - last[i]);
        if (sent[i] == 0) continue;
        if (first[i] < 0) {
          first[i] = t;
        } else {
          ++gaps;
        }
        last[i] = t;
      }
    }
    for (std::size_t i = 0; i < n; ++i) between += last[i] - first[i];
    const double mean = between / gaps;
    EXPECT_GE(mean, kGap * (kGaps - 3) / (kGaps - 1));
    EXPECT_LE(mean, kGap * kGaps / (kGaps - 1));
    EXPECT_LE(longest, 15 * kGap);
  }
}

}  // namespace
}  // namespace thinwire::test
