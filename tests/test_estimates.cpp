// EF21 and EControl through the reducer: every step beside an oracle in double, and the invariants of specs/error_control.md, part 13.

#include <gtest/gtest.h>

#include "bench/control_reference.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "tests/estimate_world.hpp"

namespace thinwire::test {
namespace {

using Init = EstimateOracle::Init;
const int kWorlds[] = {1, 2, 3, 4, 7};

TEST(Estimates, FollowTheOracle) {
  int turn = 0;
  for (const int world : kWorlds)
    for (const auto& [control, fresh] : {std::pair(false, 1.0), {false, 0.25}, {true, 1.0}, {true, 0.25}})
      for (const Init init : {Init::dense, Init::compressed, Init::zero}) {
        const int start_step = (++turn % 3) * 3 / 2;  // 0, 1, 3
        const Method method = topk_method(control, fresh, init, start_step);
        SCOPED_TRACE(method.config + " world " + std::to_string(world));
        const Outcome out = follow(scenario_of(world, method, 8), method.options);
        expect_mean_of_estimates(out, false, 8 * double(world + 3) * 0x1p-24 * 64);  // as in bound_of, but for h and H alone
        if (testing::Test::HasFailure()) return;
      }
}

TEST(Estimates, SignsFollowTheOracle) {
  int turn = 0;
  for (const int world : kWorlds)
    for (const auto& [control, fresh] : {std::pair(false, 1.0), {true, 1.0}, {true, 0.5}})
      for (const bool two_phase : {false, true}) {
        if (world == 1 && two_phase) continue;  // stays dense
        const Init init = std::array{Init::dense, Init::zero, Init::compressed}[std::size_t(++turn % 3)];
        const Method method = sign_method(control, two_phase, fresh, init, turn % 2 * 3);
        SCOPED_TRACE(method.config + " world " + std::to_string(world));
        const Outcome out = follow(scenario_of(world, method, 8), method.options);
        expect_mean_of_estimates(out, two_phase, 8 * double(world + 6) * 0x1p-24 * 64);
        if (testing::Test::HasFailure()) return;
      }
}

TEST(Estimates, NarrowGradientsFollowTheOracle) {
  for (const DType dtype : {DType::bf16, DType::fp16})
    for (const Method& method : {topk_method(false), topk_method(true, 0.25), sign_method(true, true)}) {
      SCOPED_TRACE(method.config + " " + to_string(dtype));
      Scenario s = scenario_of(3, method, 8);
      s.dtype = dtype;
      follow(s, method.options);
    }
}

// State belongs to parameters: buckets may be cut otherwise at any step (I15).
TEST(Estimates, ReBucketingChangesNoBit) {
  for (const Method& method : {topk_method(false, 0.25), topk_method(true), sign_method(true, true), sign_method(false, false)}) {
    const Scenario fixed = scenario_of(3, method, 9);
    Scenario changing = fixed;
    changing.buckets = [](int step) {
      if (step < 2) return std::vector<Ids>{{0, 1, 2, 3}};
      return step < 5 ? std::vector<Ids>{{3, 2}, {0, 1}} : std::vector<Ids>{{1}, {2}, {0, 3}};
    };
    const Outcome a = play(fixed), b = play(changing);
    expect_same_means(a, b);
    expect_same_state(a.state, b.state);
  }
}

// I1 and I2 on multiples of 1/4: Σ mean g = Σ H + mean e, to the bit. eta = 1/4 costs two bits a step, the mean of 4 two in all: multiples
// of 2^-16 below 2^7.
TEST(Estimates, NothingIsLost) {
  for (const int world : {1, 2, 4})
    for (const char* wire : {"fp32", "bf16", "fp16"})
      for (const char* init : {"dense", "zero"}) {
        Method method = topk_method(true);
        method.config = std::string("codec=topk:density=0.1,wire=") + wire + " feedback=econtrol:eta=0.25,init=" + init +
                        " exchange=gather min_numel=20";
        const Scenario s = scenario_of(world, method, 6, dyadic_number);
        const Outcome out = play(s);
        for (const std::uint32_t p : {0u, 2u})
          for (std::size_t i = 0; i < kNumel[p]; ++i) {
            double fed = 0, applied = 0, held = 0;
            for (int t = 0; t < s.steps; ++t) {
              applied += double(out.mean[std::size_t(t)][0][p][i]) * world;
              for (int r = 0; r < world; ++r) fed += s.grad(t, r, p)[i];
            }
            for (int r = 0; r < world; ++r) held += out.array(r, kModel[p].name, "residual")[i];
            ASSERT_EQ(fed, applied + held) << method.config << " world " << world << " element " << i;
          }
      }
}

// I3: multiples of 1/4 stay so under EF21, and a power of two divides them: H is the mean of all h, to the bit.
TEST(Estimates, HIsTheMeanOfAllEstimatesToTheBit) {
  for (const int world : {1, 2, 4})
    for (const Init init : {Init::dense, Init::zero})
      expect_mean_of_estimates(play(scenario_of(world, topk_method(false, 1, init), 40, dyadic_number)), false, 0);
}

// I5: eta = 0 is EF21, in every bit but the residual that it keeps beside.
TEST(Estimates, EControlWithoutEtaIsEf21) {
  for (const auto& make : {+[](bool control) { return topk_method(control, 0.25, Init::zero, 1); },
                           +[](bool control) { return sign_method(control, true); }}) {
    Method control = make(true);
    control.config.replace(control.config.find("econtrol:"), 9, "econtrol:eta=0,");
    const Outcome a = play(scenario_of(3, control, 8)), b = play(scenario_of(3, make(false), 8));
    expect_same_means(a, b);
    for (int r = 0; r < 3; ++r)
      for (const char* array : {"estimate", "mean_estimate"})
        for (const char* name : {"w", "m"}) EXPECT_TRUE(same_bits(a.array(r, name, array), b.array(r, name, array))) << name << array;
  }
}

// I17: constants that add up to 0 over the ranks lie in the dense start's estimates and in no message after it. On multiples of 1/4 nothing
// rounds for six steps (see NothingIsLost), so not a bit of the means changes; EF14 sends the constants themselves.
TEST(Estimates, ShiftsOfTheRanksChangeNothing) {
  const auto deviation = [](const std::string& feedback) {
    Scenario s = scenario_of(4, topk_method(true), 6, dyadic_number);
    s.config = "codec=topk:density=0.1,select=exact exchange=gather min_numel=20 start_step=1 feedback=" + feedback;
    const Outcome plain = play(s);
    s.grad = [grad = s.grad](int step, int rank, std::uint32_t p) {
      Vec g = grad(step, rank, p);
      const float shifts[] = {40, -8, 24, -56};
      for (std::size_t i = 0; i < g.size(); ++i) g[i] += (i % 2 != 0 ? 1.0f : -1.0f) * shifts[rank];
      return g;
    };
    const Outcome shifted = play(s);
    double most = 0;
    for (std::size_t t = 0; t < 6; ++t)
      for (const std::size_t p : {0u, 2u})
        for (std::size_t i = 0; i < kNumel[p]; ++i)
          most = std::max(most, std::fabs(double(plain.mean[t][0][p][i]) - double(shifted.mean[t][0][p][i])));
    return most;
  };
  EXPECT_EQ(deviation("ef21"), 0);
  EXPECT_EQ(deviation("econtrol:eta=0.25"), 0);
  EXPECT_EQ(deviation("econtrol:eta=0.25,worker_ema=0.5"), 0);
  EXPECT_GT(deviation("ef14"), 10);
}

/// ‖x − x*‖ of the reference after so many steps on zeta = 0, and how far off that it is on `zeta`, relative to it.
double apart(bench::Method method, double zeta, std::size_t steps) {
  const bench::LeastSquares like(16, 20, 0), unlike(16, 20, zeta);
  const bench::Descent descent{.gamma = 1 / (32 * like.smoothness()), .most = steps};
  const auto end = [&](const bench::LeastSquares& problem) {
    bench::Vector x = run_reference(problem, method, 0.018031, 1, bench::top(2), descent).x;
    for (std::size_t j = 0; j < x.size(); ++j) x[j] -= problem.minimum()[j];
    return x;
  };
  const bench::Vector a = end(like), b = end(unlike);
  double squares = 0, off = 0;
  for (std::size_t j = 0; j < a.size(); ++j) squares += a[j] * a[j], off += (a[j] - b[j]) * (a[j] - b[j]);
  return std::sqrt(off / squares);
}

// I17 in double: x − x* is the same however far the ranks are from each other, to 1e-9 of itself while it is above 1e-3 (gradients near 100
// round by 1e-14, a step). Where what is compressed is the gradient itself, it is not.
TEST(Estimates, TheReferenceDoesNotSeeHowFarRanksAreApart) {
  for (const std::size_t steps : {1u, 10u, 50u, 100u, 200u}) {
    for (const auto method : {bench::Method::ef21, bench::Method::econtrol, bench::Method::ideal, bench::Method::two_messages})
      EXPECT_LT(apart(method, 100, steps), 1e-9) << "method " << int(method) << ", " << steps << " steps";
    EXPECT_GT(apart(bench::Method::ef14, 100, steps), 1e-3) << steps << " steps";
  }
}

// I10 in double: of two messages the second, sent whole, makes up for all that the first has left out; and one rank alone, whose gradient
// is 0 at the minimum, has no use for the estimate of EC-Ideal.
TEST(Estimates, TheReferencesMethodsMeetWhereTheyShould) {
  const auto end = [](int world, bench::Method method, const bench::Compress& second) {
    const bench::LeastSquares problem(world, 20, 10);
    const bench::Descent descent{.gamma = 1 / (32 * problem.smoothness()), .most = 100};
    return run_reference(problem, method, 0, 1, bench::top(2), descent, {.second = second}).x;
  };
  for (const int world : {1, 4}) {
    const bench::Vector x = end(world, bench::Method::two_messages, bench::identity), plain = end(world, bench::Method::sgd, nullptr),
                        both = end(world, bench::Method::two_messages, nullptr);
    double off = 0;
    for (std::size_t j = 0; j < x.size(); ++j) {
      // A gradient below 64 comes back as the sum of a few that round by 2^-53 of it; gamma·L is 1/32, so none of a hundred steps adds
      // more.
      EXPECT_NEAR(x[j], plain[j], 100 * 8 * 0x1p-53 * 64) << "world " << world << " element " << j;
      off += std::fabs(both[j] - plain[j]);
    }
    EXPECT_GT(off, 1e-3);
  }
  const bench::Vector ideal = end(1, bench::Method::ideal, nullptr), plain = end(1, bench::Method::ef14, nullptr);
  for (std::size_t j = 0; j < ideal.size(); ++j) EXPECT_NEAR(ideal[j], plain[j], 100 * 8 * 0x1p-53 * 64) << j;
}

// I7: a constant gradient is learnt: h becomes it and e empties, by factors of 1 - O(eta) a step. What is left after 30/eta steps is
// rounding: of h by 2^-24 of itself, which e collects for 1/eta steps until it is fed back.
TEST(Estimates, AConstantGradientIsLearnt) {
  for (const char* eta : {"auto", "theory", "0.05"}) {
    Scenario s = scenario_of(1, topk_method(true, 1, Init::zero), eta == std::string("theory") ? 1500 : 600);
    s.config.replace(s.config.find("econtrol:"), 9, std::string("econtrol:eta=") + eta + ",");
    s.grad = [grad = s.grad](int, int rank, std::uint32_t p) { return grad(0, rank, p); };
    const Outcome out = play(s);
    const Vec g = s.grad(0, 0, 0), &h = out.array(0, "w", "estimate"), &e = out.array(0, "w", "residual");
    float largest = 0;
    for (const float x : g) largest = std::max(largest, std::fabs(x));
    for (std::size_t i = 0; i < g.size(); ++i) {
      ASSERT_NEAR(h[i], g[i], 4 * 0x1p-24 * largest) << eta << " element " << i;
      ASSERT_NEAR(e[i], 0, 60 * 4 * 0x1p-24 * largest) << eta << " element " << i;
    }
  }
}

// The rest of I7, with the recursion's own lines in double and a codec that visits two coordinates of twenty in turn: from one visit to the
// next a coordinate's residual changes by the factor 1 - 10 eta, so that eta = delta empties it at the second visit, and above twice that
// it grows.
TEST(Estimates, TurnsOfCoordinatesHaveTheirFactor) {
  constexpr std::size_t kSize = 20, kTurn = 10;  // step t visits 2 (t mod 10) and the next
  const auto play_turns = [&](double eta, std::size_t sweeps) {
    std::vector<double> residual(kSize), estimate(kSize), grad(kSize), before(kSize), ratios;
    for (std::size_t j = 0; j < kSize; ++j) grad[j] = double(j) - 7.5;
    for (std::size_t t = 0; t < sweeps * kTurn; ++t) {
      for (std::size_t j = 0; j < kSize; ++j) {
        double x;
        feedback::estimate_message<feedback::Form::control>(grad[j], eta, estimate[j], residual[j], x);
        if (j / 2 != t % kTurn) continue;
        residual[j] -= x, estimate[j] += x;
        if (t >= kTurn && std::fabs(before[j]) > 1e-6) ratios.push_back(residual[j] / before[j]);
        before[j] = residual[j];
      }
    }
    return std::tuple(ratios, residual, estimate, grad);
  };
  for (const double eta : {0.05, 0.15, 0.19, 0.21}) {
    const auto [ratios, residual, estimate, grad] = play_turns(eta, 12);
    ASSERT_GT(ratios.size(), 18u * 9) << eta;  // but for coordinates that are first visited with nothing owed
    for (const double ratio : ratios) ASSERT_NEAR(ratio, 1 - eta * double(kTurn), 1e-9) << eta;
  }
  const auto [ratios, residual, estimate, grad] = play_turns(0.1, 2);
  for (std::size_t j = 0; j < kSize; ++j) {
    EXPECT_NEAR(residual[j], 0, 1e-13) << j;
    EXPECT_NEAR(estimate[j], grad[j], 1e-13) << j;
  }
}

// I11: the table of part 3.3, to the digits it has; (1 - c)/(3c) = delta/(3c(1 + c)) with c = sqrt(1 - delta).
TEST(Estimates, EtaIsThatOfTheTable) {
  Recursion r;
  r.kind = Recursion::Kind::estimate;
  r.control = true;
  const auto eta = [&](Recursion::Eta how, double delta) {
    r.eta = how;
    return double(eta_of(r, delta));
  };
  using Eta = Recursion::Eta;
  EXPECT_NEAR(eta(Eta::theory, 0.5), .13807, 5e-6);
  EXPECT_NEAR(eta(Eta::theory, 0.1), .018031, 5e-7);
  EXPECT_NEAR(eta(Eta::theory, 0.01), .00167927, 5e-9);
  EXPECT_NEAR(eta(Eta::theory, 0.001), .000166792, 5e-10);
  EXPECT_NEAR(eta(Eta::paper, 0.5), .00125, 1e-9);
  EXPECT_NEAR(eta(Eta::paper, 0.001), 2.5e-6, 1e-12);
  for (const double delta : {0.5, 0.1, 0.01, 1e-6}) EXPECT_EQ(eta(Eta::automatic, delta), double(float(delta)));
  for (const double delta : {0.95, 0.99, 1.0}) EXPECT_EQ(eta(Eta::theory, delta), double(float(delta))) << "no eta is above delta";
  r.given_eta = 7.5f;
  EXPECT_EQ(eta(Eta::number, 0.1), 7.5);
}

// A new density brings its eta in the same step. start_step: the warm-up counts from the first compressed step.
TEST(Estimates, AWarmupMovesEtaWithTheDensity) {
  Method method = topk_method(true, 1, Init::dense, 1);
  method.config += " policy=warmup:densities=0.5/0.25,steps=3";
  method.options.density = [](int step) { return step < 4 ? 0.5 : step < 7 ? 0.25 : 0.1; };
  follow(scenario_of(3, method, 10), method.options);
}

// exchange=auto, four ranks: at density 1/2 a payload is no smaller than what a dense reduction sends. Such steps send e + g and leave the
// estimates as they are, which are old when they are needed again: so two more dense steps set them first.
TEST(Estimates, TensorsMayStayDenseForATime) {
  for (const auto& [control, init] : {std::pair(false, Init::dense), {true, Init::dense}, {true, Init::compressed}}) {
    Method method = topk_method(control, 0.5, init, 1);
    method.config.replace(method.config.find("gather"), 6, "auto");
    method.config += " policy=warmup:densities=0.25/0.5/0.25,steps=2";
    method.options.density = [](int step) { return step < 3 ? 0.25 : step < 5 ? 0.5 : step < 7 ? 0.25 : 0.1; };
    method.options.dense_now = [](int step, std::size_t) { return step == 3 || step == 4; };
    method.options.restart = [](int step) { return step == 5; };
    SCOPED_TRACE(method.config);
    Scenario s = scenario_of(4, method, 9);
    std::array<bool, 9> compressed{};
    s.after_step = [&](GradientReducer& reducer, int step, int rank) {
      if (rank == 0) compressed[std::size_t(step)] = reducer.stats().parameters[0].compressed;
    };
    follow(s, method.options);
    EXPECT_EQ(compressed, (std::array{false, true, true, false, false, false, false, true, true}));
  }
}

// C = identity: what comes back is the mean gradient, and nothing is ever held back, whatever eta is. h is g up to a rounding of t and of
// h + t, H up to one of the mean, and one more of itself a step.
TEST(Estimates, SendingEverythingIsNoCompression) {
  for (const char* feedback : {"ef21:init=zero", "econtrol:init=zero", "econtrol:eta=0.3,init=dense"}) {
    Scenario s = scenario_of(3, topk_method(true), 6);
    s.config = "codec=topk:density=1,select=exact exchange=gather min_numel=20 feedback=" + std::string(feedback);
    const Outcome out = play(s);
    for (const std::uint32_t p : {0u, 2u})
      for (std::size_t i = 0; i < kNumel[p]; ++i)
        for (int t = 0; t < 6; ++t) {
          double mean = 0;
          for (int r = 0; r < 3; ++r) mean += double(s.grad(t, r, p)[i]) / 3;
          ASSERT_NEAR(out.mean[std::size_t(t)][0][p][i], mean, (t + 1) * 6 * 0x1p-24 * 64) << feedback << " step " << t << " element " << i;
        }
    if (std::string(feedback).substr(0, 4) == "ef21") continue;
    for (int r = 0; r < 3; ++r)
      for (const float e : out.array(r, "w", "residual")) ASSERT_EQ(e, 0);
  }
}

TEST(Estimates, StatesHaveTheirNamesAndStatisticsTheirNorm) {
  using Names = std::vector<std::string>;
  const auto names = [](const Method& method, int world) {
    const Outcome out = play(scenario_of(world, method, 3));
    Names found;
    for (const auto& [name, values] : out.state.back().parameters.at("w")) found.push_back(name);
    EXPECT_TRUE(out.state.back().parameters.at("bias").empty());
    const ParameterStats& stats = out.stats.back().parameters[0];
    double squares = 0;
    if (method.options.control)
      for (const float x : out.array(world - 1, "w", "residual")) squares += double(x) * x;
    EXPECT_DOUBLE_EQ(stats.residual_norm, std::sqrt(squares));
    EXPECT_TRUE(stats.compressed) << stats.reason;
    EXPECT_EQ(squares > 0, method.options.control);
    return found;
  };
  EXPECT_EQ(names(topk_method(false), 2), (Names{"estimate", "mean_estimate"}));
  EXPECT_EQ(names(topk_method(false, 0.5), 2), (Names{"average", "estimate", "mean_estimate"}));
  EXPECT_EQ(names(topk_method(true), 1), (Names{"estimate", "mean_estimate", "residual"}));
  EXPECT_EQ(names(topk_method(true, 0.5), 2), (Names{"average", "estimate", "mean_estimate", "residual"}));
  EXPECT_EQ(names(sign_method(true, true), 3), (Names{"estimate", "mean_estimate", "residual", "server_residual"}));
  Method sampled = topk_method(true);
  sampled.config.replace(sampled.config.find("exact"), 5, "sampled");
  EXPECT_EQ(names(sampled, 2), (Names{"estimate", "mean_estimate", "residual", "threshold"}));
}

}  // namespace
}  // namespace thinwire::test
