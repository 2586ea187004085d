// What else happens to estimates: non-finite gradients, dense steps between, ranks that have run out of data, the watchdog.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include "tests/estimate_world.hpp"

namespace thinwire::test {
namespace {

using Init = EstimateOracle::Init;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

struct Accident {
  int step, rank;
  std::uint32_t parameter;
  std::size_t element;
  float value;
};

Scenario with_accidents(Scenario s, const std::vector<Accident>& accidents) {
  s.grad = [=, plain = s.grad](int step, int rank, std::uint32_t p) {
    Vec g = plain(step, rank, p);
    for (const Accident& a : accidents)
      if (a.step == step && a.rank == rank && a.parameter == p) g[a.element] = a.value;
    return g;
  };
  return s;
}

/// Of compressed tensors and passengers, one rank or several, one bucket or both; `first` is the first bad step.
std::vector<Accident> accidents(int world, int first) {
  return {{first, 0, 0, 524, kNan},
          {first + 1, world - 1, 1, 0, -kInf},
          {first + 3, 0, 2, 0, kInf},
          {first + 3, world - 1, 0, 1, kNan},
          {first + 4, 0, 0, 300, -kInf}};
}

// Payloads hold finite values only, so estimates advance on all ranks alike (I14 as DESIGN.md 4 has it), and EControl's residual takes its
// new estimate back.
TEST(EstimateVerdicts, FollowTheOracle) {
  int turn = 0;
  for (const int world : {1, 2, 3, 4, 7})
    for (const bool step_verdict : {false, true})
      for (const bool control : {false, true})
        for (const bool sign : {false, true}) {
          // With init=dense the first accident of some runs spoils the start itself.
          const Init init = std::array{Init::dense, Init::compressed, Init::zero}[std::size_t(++turn % 3)];
          const int start_step = turn % 2 * 2;
          const double fresh = turn % 5 == 0 ? 0.5 : 1;
          const bool two_phase = sign && world > 1 && turn % 4 != 0;
          if (sign && !two_phase && world == 1) continue;
          Method method = sign ? sign_method(control, two_phase, fresh, init, start_step) : topk_method(control, fresh, init, start_step);
          method.options.step_verdict = step_verdict;
          for (const int first : {0, 1, 3}) {
            SCOPED_TRACE(method.config + " world " + std::to_string(world) + " first accident " + std::to_string(first) +
                         (step_verdict ? " verdict of the step" : ""));
            const Outcome out = follow(with_accidents(scenario_of(world, method, 10), accidents(world, first)), method.options);
            expect_mean_of_estimates(out, two_phase, 10 * double(world + 6) * 0x1p-24 * 64);
            if (testing::Test::HasFailure()) return;
          }
        }
}

TEST(EstimateVerdicts, DenseStepsBetweenFollowTheOracle) {
  for (const int world : {1, 2, 3, 4})
    for (const Method& method : {topk_method(false, 0.5), topk_method(true), topk_method(true, 0.5, Init::compressed),
                                 sign_method(true, true, 1, Init::zero), sign_method(false, true), sign_method(true, false)}) {
      if (world == 1 && method.options.two_phase) continue;
      for (const bool step_verdict : {false, true}) {
        SCOPED_TRACE(method.config + " world " + std::to_string(world));
        Method with = method;
        with.options.step_verdict = step_verdict;
        // Dense: steps 0, 4, 5 (where something is not finite) and 7.
        const Scenario s = with_accidents(scenario_of(world, with, 10), {{5, world - 1, 0, 100, kNan}, {5, 0, 2, 7, kInf}});
        const Outcome out = follow(s, with.options, {0, 4, 5, 7});
        expect_mean_of_estimates(out, with.options.two_phase, 10 * double(world + 6) * 0x1p-24 * 64);
        if (testing::Test::HasFailure()) return;
      }
    }
}

// Right after a dense step: nothing is held back, estimates are what they were, and H is their mean, with nothing left for owners to send.
TEST(EstimateVerdicts, AFlushEmptiesResidualsAndLeavesEstimates) {
  for (const Method& method : {topk_method(true, 0.5), sign_method(true, true)})
    for (const bool bad : {false, true}) {
      Scenario s = scenario_of(3, method, 5);
      const Outcome before = play(s);
      s.steps = 6;
      if (bad) s = with_accidents(s, {{5, 1, 0, 3, kInf}, {5, 1, 2, 3, kInf}});
      s.before_step = [](GradientReducer& reducer, int step, int) {
        if (step == 5) reducer.flush();
      };
      const Outcome after = play(s);
      double held = 0;
      for (int r = 0; r < 3; ++r)
        for (const char* name : {"w", "m"}) {
          for (const char* array : {"estimate", "average"})
            if (after.state[0].parameters.at(name).contains(array)) {
              EXPECT_TRUE(same_bits(after.array(r, name, array), before.array(r, name, array)));
            }
          for (const float x : after.array(r, name, "residual")) held += std::fabs(x);
        }
      EXPECT_EQ(held > 0, bad);
      for (const char* name : {"w", "m"}) {
        if (!method.options.two_phase) break;
        for (const double x : server_residual(after, name)) ASSERT_EQ(x, 0);
        double gap = 0;
        for (const double x : server_residual(before, name)) gap += std::fabs(x);
        EXPECT_GT(gap, 1) << "there was nothing to settle";
      }
      expect_mean_of_estimates(after, false, 6 * 0x1p-24 * 64);
    }
}

// Estimates near the largest float: their sum is past it, H never is, whatever step makes it.
TEST(EstimateVerdicts, HIsCutAtTheLargestFloat) {
  for (const bool flush : {false, true}) {
    Scenario s = scenario_of(2, topk_method(false, 1, Init::zero), 3);
    s.grad = [](int, int, std::uint32_t p) {
      Vec g(kNumel[p], 0.0f);
      if (p == 2) g[9] = 3e38f, g[10] = -3e38f;
      return g;
    };
    s.before_step = [flush](GradientReducer& reducer, int step, int) {
      if (flush && step == 2) reducer.flush();
    };
    const Outcome out = play(s);
    for (int r = 0; r < 2; ++r) {
      EXPECT_EQ(out.array(r, "m", "estimate")[9], 3e38f);
      EXPECT_EQ(out.array(r, "m", "mean_estimate")[9], std::numeric_limits<float>::max());
      EXPECT_EQ(out.array(r, "m", "mean_estimate")[10], -std::numeric_limits<float>::max());
    }
  }
}

// Multiples of 1/4, eta = 1/4 and four ranks: nothing rounds in six steps, so what went in is in e and in the means that were applied, to
// the bit, those of bad steps included, wherever the elements themselves were finite.
TEST(EstimateVerdicts, NothingIsLost) {
  for (const int world : {1, 2, 4})
    for (const bool step_verdict : {false, true})
      for (const Init init : {Init::dense, Init::zero}) {
        Method method = topk_method(true, 1, init);
        method.config.replace(method.config.find("econtrol:"), 9, "econtrol:eta=0.25,");
        method.options.eta = 0.25;
        method.options.step_verdict = step_verdict;
        const std::vector<Accident> bad = {{2, 0, 0, 17, kNan}, {2, world - 1, 2, 5, kInf}, {4, 0, 0, 200, -kInf}};
        const Scenario s = with_accidents(scenario_of(world, method, 6, dyadic_number), bad);
        const Outcome out = follow(s, method.options, {}, true);
        EXPECT_EQ(out.stats[0].nonfinite_steps, 2u);
        for (const std::uint32_t p : {0u, 2u})
          for (std::size_t i = 0; i < kNumel[p]; ++i) {
            double fed = 0, applied = 0, held = 0;
            for (int t = 0; t < s.steps; ++t) {
              const bool lost = t == 2 || (t == 4 && (p == 0 || step_verdict));  // at 2 both buckets have one
              applied += lost ? 0 : double(out.mean[std::size_t(t)][0][p][i]) * world;
              for (int r = 0; r < world; ++r) fed += s.grad(t, r, p)[i];
            }
            for (int r = 0; r < world; ++r) held += out.array(r, kModel[p].name, "residual")[i];
            if (std::isfinite(fed)) { ASSERT_EQ(fed, applied + held) << "world " << world << " element " << i; }
          }
      }
}

// Its estimate would go on being its share of the mean: so a rank without data has a gradient of 0, which its estimate follows.
TEST(EstimateVerdicts, ARankThatHasRunOutOfDataHasAGradientOfZero) {
  for (const Method& method : {topk_method(false, 0.5), topk_method(true), sign_method(true, true), sign_method(false, false)})
    for (const bool bad : {false, true}) {
      SCOPED_TRACE(method.config);
      Scenario s = scenario_of(3, method, 9);
      s.options = [](int step, int rank) {
        ReduceOptions options;
        options.joined = rank == 1 && step >= 4;
        return options;
      };
      if (bad) s = with_accidents(s, {{6, 0, 0, 3, kInf}});
      const Outcome out = follow(s, method.options, {7});
      Scenario live = s;
      live.options = nullptr;
      live.grad = [grad = s.grad](int step, int rank, std::uint32_t p) {
        Vec g = grad(step, rank, p);
        if (rank == 1 && step >= 4) std::fill(g.begin(), g.end(), 0.0f);
        return g;
      };
      live.before_step = [](GradientReducer& reducer, int step, int) {
        if (step == 7) reducer.flush();
      };
      expect_same_state(out.state, play(live).state);
    }
}

// The last dense step sets the estimates: that of a rank which has no data any more becomes 0, whatever an earlier one had set.
TEST(EstimateVerdicts, AJoinedRankStartsFromNothing) {
  for (const bool control : {false, true})
    for (const int from : {0, 1}) {
      const Method method = topk_method(control, 0.5, Init::dense, 2);
      Scenario s = scenario_of(3, method, 4);
      s.options = [from](int step, int rank) {
        ReduceOptions options;
        options.joined = rank == 2 && step >= from;
        return options;
      };
      const Outcome out = follow(s, method.options);
      for (const float h : out.array(2, "w", "estimate")) ASSERT_EQ(h, 0);
    }
}

// Under a grad scaler state is in true units: a power of two changes no bit of it, and means come back scaled.
TEST(EstimateVerdicts, TheLossScaleLeavesStateAsItIs) {
  for (const Method& method : {topk_method(true, 0.5), sign_method(true, true)}) {
    Scenario s = scenario_of(3, method, 6);
    const Outcome plain = play(s);
    s.options = [](int step, int) {
      ReduceOptions options;
      options.loss_scale = step < 3 ? 1024.0f : 512.0f;
      return options;
    };
    s.grad = [grad = s.grad](int step, int rank, std::uint32_t p) {
      Vec g = grad(step, rank, p);
      for (float& x : g) x *= step < 3 ? 1024.0f : 512.0f;
      return g;
    };
    const Outcome scaled = play(s);
    expect_same_state(plain.state, scaled.state);
    for (std::size_t t = 0; t < 6; ++t)
      for (std::size_t p = 0; p < kModel.size(); ++p) {
        Vec mean = plain.mean[t][0][p];
        for (float& x : mean) x *= t < 3 ? 1024.0f : 512.0f;
        EXPECT_TRUE(same_bits(scaled.mean[t][0][p], mean)) << "step " << t;
      }
  }
}

// A small gradient at a step that is looked at is no residual that grows: eta=auto is stable. 9/10 is not, at a density of 1/10.
TEST(EstimateVerdicts, TheWatchdogKnowsNoiseFromGrowth) {
  for (const char* eta : {"auto", "0.9"}) {
    Scenario s = scenario_of(2, topk_method(true), 140);
    s.config = std::string("codec=topk:density=0.1,select=exact feedback=econtrol:eta=") + eta + " exchange=gather min_numel=20";
    s.grad = [grad = s.grad](int step, int rank, std::uint32_t p) {
      Vec g = grad(step, rank, p);
      for (float& x : g) x *= step == 128 ? 0.05f : 1;
      return g;
    };
    std::string told[2];
    s.before_step = [&told](GradientReducer& reducer, int step, int rank) {
      if (step == 130) (void)reducer.stats();  // a GPU's records come with them
      told[rank] += reducer.take_notice();
    };
    const Stats stats = play(s).stats[0];
    for (const std::size_t p : {0u, 2u}) EXPECT_EQ(stats.parameters[p].eta_cuts > 0, eta[0] == '0') << eta;
    for (int rank = 0; rank < 2; ++rank) {  // once
      const std::size_t at = told[rank].find("the watchdog has lowered eta of 'w' to ");
      EXPECT_EQ(told[rank].find("rank " + std::to_string(rank) + ", after step "), eta[0] == '0' ? 0 : std::string::npos) << told[rank];
      EXPECT_EQ(at != std::string::npos, eta[0] == '0') << told[rank];
      EXPECT_EQ(told[rank].find("the watchdog", at + 1), std::string::npos) << told[rank];
    }
    EXPECT_EQ(stats.parameters[0].eta, eta[0] == '0' ? stats.parameters[0].eta : 53.0f / 525);
  }
}

// An eta that is unstable by little: the residual grows less than tenfold within any window, and is caught all the same.
TEST(EstimateVerdicts, TheWatchdogAddsUpSlowGrowth) {
  Scenario s = scenario_of(2, topk_method(true), 400);
  s.config = "codec=topk:density=0.1,select=exact feedback=econtrol:eta=0.35 exchange=gather min_numel=20";
  const Stats stats = play(s).stats[0];
  EXPECT_GE(stats.parameters[0].eta_cuts.value_or(0), 1u);
  EXPECT_LT(stats.parameters[0].residual_norm, 100 * stats.parameters[0].grad_norm);
}

// An eta between the contraction and twice it is stable, and so is that of signs whose measured contraction is small. What empties or
// scales the residual, and gradients that are small or large for a step or from one on, are no growth.
TEST(EstimateVerdicts, TheWatchdogLeavesStableEtasAlone) {
  const auto noise = [](int step, int rank, std::uint32_t p, double share) {
    std::mt19937 random(std::uint32_t(step * 31 + rank * 7 + int(p)));
    std::normal_distribution<float> normal;
    Vec g(kNumel[p]);
    for (float& x : g) x = double(random() % 1000) < 1000 * share ? normal(random) : 0;
    return g;
  };
  const std::string top = "codec=topk:density=0.1,select=exact feedback=econtrol:eta=0.15 exchange=gather min_numel=20",
                    sparse = "codec=topk:density=0.02,select=exact feedback=econtrol:eta=0.03 exchange=gather min_numel=20",
                    signs = "codec=sign:block=tensor feedback=econtrol exchange=gather min_numel=20";
  using Before = std::function<void(GradientReducer&, int, int)>;
  const struct {
    const char* what;
    std::string config;
    double share;
    std::function<float(int)> scale;
    Before before;
  } cases[] = {
      {"flushes", sparse, 1, [](int) { return 1.0f; },
       [](GradientReducer& reducer, int step, int) {
         if (step % 400 == 399) reducer.flush();
       }},
      {"a smaller learning rate", top, 1, [](int) { return 1.0f; },
       [](GradientReducer& reducer, int step, int) {
         const std::vector<float> factors(kModel.size(), 10.0f);
         if (step == 300) reducer.rescale_residuals(factors);
       }},
      {"small gradients", top, 1, [](int step) { return step % 128 == 0 ? 0.05f : 1.0f; }, nullptr},
      {"large gradients", top, 1, [](int step) { return step % 40 == 0 ? 10.0f : 1.0f; }, nullptr},
      {"larger gradients from a step on", top, 1, [](int step) { return step >= 600 ? 5.0f : 1.0f; }, nullptr},
      {"much larger ones", top, 1, [](int step) { return step >= 601 ? 20.0f : 1.0f; }, nullptr},
      {"a steep rise", top, 1, [](int step) { return step < 600 ? 1.0f : std::min(std::pow(1.1f, float(step - 600)), 20.0f); }, nullptr},
      {"much smaller ones", top, 1, [](int step) { return step >= 602 ? 0.05f : 1.0f; }, nullptr},
      {"a phase of large ones", top, 1, [](int step) { return step >= 600 && step < 630 ? 20.0f : 1.0f; }, nullptr},
      {"signs of sparse gradients, small ones", signs, 0.02, [](int step) { return step % 256 == 0 ? 0.05f : 1.0f; }, nullptr},
      {"signs of sparse gradients, large ones", signs, 0.02, [](int step) { return step % 20 == 0 ? 10.0f : 1.0f; }, nullptr}};
  for (const auto& one : cases) {
    Scenario s = scenario_of(1, topk_method(true), 1200);
    s.config = one.config;
    s.device = -1;  // the same arithmetic on a GPU (test_reducer_device.cpp)
    s.before_step = one.before;
    s.grad = [&](int step, int rank, std::uint32_t p) {
      Vec g = noise(step, rank, p, one.share);
      for (float& x : g) x *= one.scale(step);
      return g;
    };
    const Stats stats = play(s).stats[0];
    for (const ParameterStats& p : stats.parameters)
      if (p.compressed) EXPECT_EQ(p.eta_cuts, 0u) << one.what << " " << p.name << " eta " << *p.eta;
  }
}

// At small densities a settled residual is hundreds of times a fresh one: what a flush has emptied grows back, and that is no growth.
TEST(EstimateVerdicts, TheWatchdogStartsAnewAfterAFlush) {
  Scenario s = scenario_of(1, topk_method(true), 5600);
  s.config = "codec=topk:density=0.002,select=exact feedback=econtrol:eta=0.003 exchange=gather min_numel=20";
  s.parameters = {{"w", {50, 100}}};
  s.buckets = nullptr;
  s.device = -1;
  s.before_step = [](GradientReducer& reducer, int step, int) {
    if (step == 3000) reducer.flush();
  };
  s.grad = [](int step, int, std::uint32_t) {
    std::mt19937 random{std::uint32_t(step)};
    std::uniform_real_distribution<float> uniform(-1, 1);
    Vec g(5000);
    for (float& x : g) x = uniform(random);
    return g;
  };
  const ParameterStats w = play(s).stats[0].parameters[0];
  EXPECT_EQ(w.eta_cuts, 0u) << *w.eta;
  EXPECT_GT(w.residual_norm, 10 * w.grad_norm);  // so without that, its square's growth is more than a hundredfold
}

// Before anything was started a dense step has no estimates to reduce again: the bytes are those of EF14.
TEST(EstimateVerdicts, DenseStepsBeforeAStartCostWhatTheyDoElsewhere) {
  const auto bytes = [](const std::string& feedback) {
    Scenario s = scenario_of(2, topk_method(true), 3);
    s.config = "codec=topk:density=0.1 feedback=" + feedback + " exchange=gather min_numel=20 start_step=3";
    return play(s).stats[0].wire_bytes;
  };
  for (const char* feedback : {"econtrol:init=zero", "econtrol:init=compressed", "econtrol", "ef21"})
    EXPECT_EQ(bytes(feedback), bytes("ef14")) << feedback;
}

// Under worker_ema h follows the average, so that is what it is late behind: after a dense start, not at all.
TEST(EstimateVerdicts, StaleIsOfWhatIsFollowed) {
  Scenario s = scenario_of(2, topk_method(true), 65);
  s.config = "codec=topk:density=0.1,select=exact feedback=econtrol:worker_ema=0.125 exchange=gather min_numel=20";
  const Outcome out = play(s);
  double late = 0, followed = 0;  // of the state after step 64, at which it was looked at
  for (std::size_t i = 0; i < kNumel[0]; ++i) {
    const double v = out.array(0, "w", "average")[i], h = out.array(0, "w", "estimate")[i];
    late += (v - h) * (v - h), followed += v * v;
  }
  EXPECT_NEAR(*out.stats[0].parameters[0].stale, std::sqrt(late / followed), 1e-6);
}

}  // namespace
}  // namespace thinwire::test
