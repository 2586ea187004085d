// State in two bytes per element: residuals in bf16, estimates on bf16's grid. What holds of them through the reducer; the codecs' own
// suites follow them element by element.

#include <gtest/gtest.h>

#include "compressors/core/recursion.hpp"
#include "compressors/core/registry.hpp"
#include "tests/estimate_world.hpp"

namespace thinwire::test {
namespace {

bool is_bf16(float x) { return (float_bits(x) & 0xffffu) == 0; }

/// A method with the words put behind its feedback.
Method with(Method method, const std::string& words) {
  const std::size_t end = method.config.find(' ', method.config.find("feedback="));
  method.config.insert(end, "," + words);
  return method;
}
Method ef14(const std::string& codec, const std::string& exchange = "gather") {
  Method out;
  out.config = "codec=" + codec + " feedback=ef14:residual=bf16 exchange=" + exchange + " min_numel=20";
  return out;
}

struct Sums {
  double fed = 0, applied = 0, held = 0;
};
/// Of one element: what was fed in over all ranks and steps, what came back (not of bad steps) times the world, and what is held at the
/// end.
Sums sums_of(const Scenario& s, const Outcome& out, std::uint32_t p, std::size_t i) {
  Sums sums;
  for (int t = 0; t < s.steps; ++t) {
    const float mean = out.mean[std::size_t(t)][0][p][i];
    if (std::isfinite(mean)) sums.applied += double(mean) * s.world;
    for (int r = 0; r < s.world; ++r) sums.fed += s.grad(t, r, p)[i];
  }
  for (int r = 0; r < s.world; ++r) sums.held += out.array(r, kModel[p].name, "residual")[i];
  return sums;
}

// On the grid everything is exact that is exact without it (NothingIsLost of test_estimates), and so is the dense start, whose rest stays
// in the residual.
TEST(NarrowState, TheGridLosesNothing) {
  for (const int world : {1, 2, 4})
    for (const char* init : {"dense", "compressed", "zero"}) {
      Method method = topk_method(true);
      method.config = std::string("codec=topk:density=0.1 feedback=econtrol:eta=0.25,estimate=grid,init=") + init +
                      " exchange=gather min_numel=20 start_step=" + (init[0] == 'd' ? "2" : "0");
      Scenario s = scenario_of(world, method, 6, dyadic_number);
      s.grad = [plain = s.grad](int step, int rank, std::uint32_t p) {  // eleven bits, so that bf16 rounds from the start
        Vec g = plain(step, rank, p);
        for (std::size_t i = 0; i < g.size(); ++i) g[i] += i % 3 == 0 ? 64.0f : -32.0f;
        return g;
      };
      const Outcome out = play(s);
      expect_mean_of_estimates(out, false, 0);
      double rests = 0;
      for (const std::uint32_t p : {0u, 2u})
        for (std::size_t i = 0; i < kNumel[p]; ++i) {
          const Sums sums = sums_of(s, out, p, i);
          if (init[0] != 'c') { ASSERT_EQ(sums.fed, sums.applied + sums.held) << method.config << " world " << world << " element " << i; }
          rests += std::fabs(sums.held);
          for (int r = 0; r < world; ++r) ASSERT_TRUE(is_bf16(out.array(r, kModel[p].name, "estimate")[i]));
        }
      EXPECT_GT(rests, 100) << "nothing was held back";
    }
}

// Only the dense step that sets the estimates sends what bf16 can hold; those before it leave nothing out.
TEST(NarrowState, DenseStepsBeforeTheStartSendAll) {
  for (const Method& method : {with(topk_method(true, 1, EstimateOracle::Init::dense, 3), "residual=bf16"),
                               with(topk_method(true, 1, EstimateOracle::Init::dense, 3), "residual=bf16,estimate=grid"),
                               with(topk_method(false, 1, EstimateOracle::Init::dense, 3), "estimate=grid")}) {
    SCOPED_TRACE(method.config);
    Scenario s = scenario_of(2, method, 3);
    s.grad = [](int, int, std::uint32_t p) { return Vec(kNumel[p], 1.0009765625f); };  // eleven bits
    const Outcome out = play(s);
    for (const std::uint32_t p : {0u, 2u}) {
      EXPECT_EQ(out.mean[0][0][p], Vec(kNumel[p], 1.0009765625f));
      EXPECT_EQ(out.mean[1][0][p], Vec(kNumel[p], 1.0009765625f));
      EXPECT_EQ(out.mean[2][0][p], Vec(kNumel[p], 1.0f));
    }
  }
}

// A stored residual is off by 2^-9 of itself, twice a step and once more after a bad one; it is no larger than twice the largest gradient
// of every step before, be it a neighbour's, whose share a block's scale is.
TEST(NarrowState, AResidualInBf16LosesItsRoundingOnly) {
  for (const int world : {1, 2, 3})
    for (const Method& method : {ef14("topk:density=0.1,select=exact"), ef14("topk:density=0.1,wire=bf16"), ef14("sign:block=8"),
                                 with(topk_method(true, 1, EstimateOracle::Init::zero), "residual=bf16"),
                                 with(topk_method(true), "residual=bf16,estimate=grid"), with(sign_method(true, false), "residual=bf16")}) {
      constexpr int kSteps = 6, kBad = 3;
      Scenario s = scenario_of(world, method, kSteps);
      const Outcome out = play(s);
      double largest = 0, most = 0;
      for (int t = 0; t < kSteps; ++t)
        for (int r = 0; r < world; ++r)
          for (const std::uint32_t p : {0u, 2u})
            for (const float g : s.grad(t, r, p)) largest = std::max<double>(largest, std::fabs(g));
      const double bound = kSteps * world * (2 * 0x1p-9 + 0x1p-18) * 2 * kSteps * largest;
      for (const std::uint32_t p : {0u, 2u})
        for (std::size_t i = 0; i < kNumel[p]; ++i) {
          const Sums sums = sums_of(s, out, p, i);
          ASSERT_NEAR(sums.fed, sums.applied + sums.held, bound) << method.config << " world " << world << " element " << i;
          most = std::max(most, std::fabs(sums.fed) / bound);
          for (int r = 0; r < world; ++r) ASSERT_TRUE(is_bf16(out.array(r, kModel[p].name, "residual")[i]));
        }
      EXPECT_GT(most, 3) << method.config << ": the bound tells nothing apart";
      if (method.config.find("econtrol") != std::string::npos)
        expect_mean_of_estimates(out, false, kSteps * double(world + 3) * 0x1p-24 * 64);

      // A bad step brings nothing, and what was fed in then is held; where there is an estimate, beside it.
      s.grad = [plain = s.grad](int step, int rank, std::uint32_t p) {
        Vec g = plain(step, rank, p);
        if (step == kBad && rank == 0 && p != 1 && p != 3) g[7] = std::numeric_limits<float>::quiet_NaN();
        return g;
      };
      Scenario through = s;
      through.steps = kBad + 1;
      const Outcome bad = play(through);
      for (const std::uint32_t p : {0u, 2u})
        for (std::size_t i = 0; i < kNumel[p]; ++i) {
          ASSERT_TRUE(std::isnan(bad.mean[kBad][0][p][i]));
          if (i == 7) continue;
          const Sums sums = sums_of(through, bad, p, i);
          ASSERT_NEAR(sums.fed, sums.applied + sums.held, bound)
              << method.config << " world " << world << " element " << i << " after a bad step";
        }
    }
}

TEST(NarrowState, ACheckpointGoesOnToTheBit) {
  for (const Method& method : {ef14("topk:density=0.1"), ef14("sign:block=64", "two_phase"),
                               with(topk_method(true, 0.5, EstimateOracle::Init::dense, 3), "residual=bf16,estimate=grid"),
                               with(topk_method(false), "estimate=grid"), with(sign_method(true, true), "residual=bf16")})
    expect_checkpoints_go_on(method);
}

// Four ranks' estimates have a mean that bf16 does not hold: what it cuts off H loses too. So e + h is all that a rank has yet to deliver,
// as before, and nothing is lost.
TEST(NarrowState, AnotherWorldKeepsTheMeanOnTheGrid) {
  const Method method = with(topk_method(true), "estimate=grid");
  const std::vector<ReducerState> old = play(scenario_of(4, method, 5, dyadic_number)).state;
  Scenario s = scenario_of(2, method, 1, dyadic_number);
  s.start = old;
  std::vector<ReducerState> loaded(2);
  s.before_step = [&](GradientReducer& reducer, int, int rank) { loaded[std::size_t(rank)] = reducer.state(); };
  expect_mean_of_estimates(play(s), false, 64 * 0x1p-24);
  std::size_t cut = 0;
  for (const char* name : {"w", "m"})
    for (std::size_t i = 0; i < old[0].parameters.at(name).at("estimate").size(); ++i) {
      const auto mean = [&](const char* array) {
        double sum = 0;
        for (const ReducerState& state : old) sum += state.parameters.at(name).at(array)[i];
        return sum / 4;
      };
      const auto& now = loaded[1].parameters.at(name);
      const double rest = mean("estimate") - now.at("estimate")[i];
      ASSERT_TRUE(is_bf16(now.at("estimate")[i]));
      ASSERT_NEAR(now.at("mean_estimate")[i], now.at("estimate")[i], 64 * 0x1p-24);
      ASSERT_NEAR(now.at("residual")[i], mean("residual"), 64 * 0x1p-24);
      cut += rest != 0 ? 1 : 0;
    }
  EXPECT_GT(cut, 20u) << "bf16 held every mean";
}

TEST(NarrowState, EstimatesOffTheGridAreRefused) {
  const Method grid = with(topk_method(true), "estimate=grid");
  Scenario s = scenario_of(2, grid, 1);
  s.start = play(scenario_of(2, topk_method(true), 4)).state;
  try {
    play(s);
    FAIL() << "loaded";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), Errc::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("'w' 'estimate' holds values that are no bf16 numbers"), std::string::npos) << error.what();
  }
}

// Two bytes are two bytes: the other arrays of a config whose state is wide lie where they lay.
TEST(NarrowState, RecursionsSayHowTheirStateIsStored) {
  const auto dtypes = [](const char* feedback) {
    const Recursion r = make_recursion(Config::parse(std::string("codec=topk:density=0.1 feedback=") + feedback));
    std::size_t bytes = 0;
    for (std::size_t j = 0; j < state_names(r).size(); ++j) bytes += size_of(state_dtype(r, j));
    return bytes;
  };
  EXPECT_EQ(dtypes("ef14"), 4u);
  EXPECT_EQ(dtypes("ef14:residual=bf16"), 2u);
  EXPECT_EQ(dtypes("dgc"), 8u);
  EXPECT_EQ(dtypes("ef21"), 8u);
  EXPECT_EQ(dtypes("ef21:estimate=grid"), 6u);
  EXPECT_EQ(dtypes("econtrol"), 12u);
  EXPECT_EQ(dtypes("econtrol:residual=bf16"), 10u);
  EXPECT_EQ(dtypes("econtrol:residual=bf16,estimate=grid"), 8u);
  EXPECT_EQ(dtypes("econtrol:residual=bf16,estimate=grid,worker_ema=0.1"), 12u);

  // Every array of w and m begins at a cache line.
  const auto kept = [](const Method& method) { return play(scenario_of(2, method, 2)).stats[0].state_bytes; };
  const std::size_t wide = 4 * (528 + 288), half = 2 * (544 + 288);
  EXPECT_EQ(kept(topk_method(true)), 3 * wide);
  EXPECT_EQ(kept(with(topk_method(true), "residual=bf16")), 2 * wide + half);
  EXPECT_EQ(kept(with(topk_method(true), "residual=bf16,estimate=grid")), wide + 2 * half);
}

}  // namespace
}  // namespace thinwire::test
