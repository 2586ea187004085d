// Signs over two phases: means and states against plain loops to the bit, whatever the world, the buckets and the dtype; bytes; dense
// steps; masks; verdicts; state that moves to another world.

#include <gtest/gtest.h>

#include <numeric>

#include "tests/reducer_world.hpp"
#include "tests/two_phase_oracle.hpp"

namespace thinwire::test {
namespace {

// Tails, parts that are short or empty, a tensor that stays dense between others, one of several blocks.
const std::vector<Parameter> kParameters = {{"a", {33, 31}}, {"bias", {17}}, {"b", {2, 5, 7}}, {"c", {3, 6000}}, {"d", {2, 4}}};
const std::vector<std::size_t> kNumel = {1023, 17, 70, 18000, 8};
const std::vector<bool> kCompressed = {true, false, true, true, true};

struct Case {
  std::string config;
  TwoPhaseOracle::Options options;
};
const Case kCases[] = {
    {"codec=sign:block=64 feedback=ef14", {.block = 64}},
    {"codec=sign feedback=ef14:decay=0.5", {.decay = 0.5f, .block = 1024}},
    {"codec=sign:block=tensor,scale=l2 feedback=none", {.feedback = false, .block = 0, .l2 = true}},
    {"onebit_adam:freeze=2,block=24", {.averaged = true, .freeze = 2, .block = 24}},
    {"onebit_adam:freeze=1,beta1=0.5,scale=l2,block=8192", {.averaged = true, .beta1 = 0.5f, .freeze = 1, .block = 8192, .l2 = true}},
    {"codec=sign feedback=none target=momentum:freeze=1", {.feedback = false, .averaged = true, .freeze = 1, .block = 1024}},
};

const std::vector<Ids> kOneBucket = {{0, 1, 2, 3, 4}}, kThree = {{3}, {1, 4, 2}, {0}};

std::vector<std::vector<Vec>> gradients_of(const std::function<Vec(int, int, std::uint32_t)>& grad, int step, int world) {
  std::vector<std::vector<Vec>> out;
  for (int r = 0; r < world; ++r) {
    out.emplace_back();
    for (std::uint32_t p = 0; p < kNumel.size(); ++p) out.back().push_back(grad(step, r, p));
  }
  return out;
}

void expect_oracle_state(const TwoPhaseOracle& oracle, const Outcome& out) {
  for (int r = 0; r < oracle.world; ++r) {
    for (std::size_t p = 0; p < kNumel.size(); ++p) {
      const auto& arrays = out.state[std::size_t(r)].parameters.at(kParameters[p].name);
      if (!kCompressed[p]) {
        EXPECT_TRUE(arrays.empty());
        continue;
      }
      const std::string where = "rank " + std::to_string(r) + " " + kParameters[p].name;
      const std::size_t length = oracle.part_length(kNumel[p]), first = std::min(kNumel[p], std::size_t(r) * length);
      const auto begin = oracle.server[p].begin() + std::ptrdiff_t(first);
      EXPECT_TRUE(same_bits(arrays.at("server_residual"), Vec(begin, begin + std::ptrdiff_t(std::min(length, kNumel[p] - first)))))
          << where;
      if (oracle.options.feedback) EXPECT_TRUE(same_bits(arrays.at("residual"), oracle.residual[std::size_t(r)][p])) << where;
      if (oracle.options.averaged) EXPECT_TRUE(same_bits(arrays.at("momentum"), oracle.momentum[p])) << where;
      EXPECT_EQ(arrays.size(), 1u + oracle.options.feedback + oracle.options.averaged);
    }
  }
}

void follow(const Case& c, int world, DType dtype, const std::vector<Ids>& buckets,
            const std::function<Vec(int, int, std::uint32_t)>& grad) {
  SCOPED_TRACE(c.config + " world " + std::to_string(world) + " " + to_string(dtype));
  constexpr int kSteps = 5;
  const Outcome out = play({.world = world,
                            .config = c.config + " min_numel=1",
                            .parameters = kParameters,
                            .steps = kSteps,
                            .dtype = dtype,
                            .grad = grad,
                            .buckets = [&](int) { return buckets; }});
  TwoPhaseOracle::Options options = c.options;
  options.dtype = dtype;
  TwoPhaseOracle oracle(world, kNumel, kCompressed, options);
  for (int t = 0; t < kSteps; ++t) {
    const auto want = oracle.run(t, {gradients_of(grad, t, world), buckets});
    for (int r = 0; r < world; ++r)
      for (std::size_t p = 0; p < kNumel.size(); ++p)
        ASSERT_TRUE(same_values(out.mean[std::size_t(t)][std::size_t(r)][p], want[p]))
            << "step " << t << " rank " << r << " " << kParameters[p].name;
  }
  expect_oracle_state(oracle, out);
}

TEST(TwoPhase, FollowsTheEquations) {
  const auto grad = numbers(dyadic_number, 5, kParameters);
  for (const Case& c : kCases)
    for (const int world : {2, 3, 4, 7}) {
      follow(c, world, DType::fp32, world % 2 == 0 ? kOneBucket : kThree, numbers(real_number, 3, kParameters));
      if (HasFatalFailure()) return;
      for (const DType dtype : {DType::bf16, DType::fp16}) follow(c, world, dtype, kThree, grad);
      if (HasFatalFailure()) return;
    }
}

// Local gradients, before they enter the dense mean or a message: of some parameters and ranks, whose gradients are large here. Multiples
// of 1/4, so that the norms are exact.
TEST(TwoPhase, ClipsLocalGradients) {
  const auto grad = [&](int step, int rank, std::uint32_t p) {
    Vec g = numbers(dyadic_number, 5, kParameters)(step, rank, p);
    for (float& x : g) x *= float(1 + (step + rank + int(p)) % 3);
    if (step == 3 && rank == 1 && p == 3) g[700] = NAN;
    return g;
  };
  for (const char* target : {"onebit_adam:freeze=2,block=24,clip_norm=500", "onebit_adam:freeze=1,beta1=0.5,block=1024,clip_norm=700"}) {
    const bool first = target == std::string("onebit_adam:freeze=2,block=24,clip_norm=500");
    const TwoPhaseOracle::Options options = {.averaged = true,
                                             .beta1 = first ? 0.9f : 0.5f,
                                             .freeze = first ? 2 : 1,
                                             .block = first ? 24u : 1024u,
                                             .clip_norm = first ? 500.0 : 700.0};
    for (const int world : {2, 3, 4, 7}) {
      const TwoPhaseOracle oracle(world, kNumel, kCompressed, options);
      int clipped = 0, whole = 0;
      const TwoPhaseOracle::Step raw{gradients_of(grad, 2, world), {}}, cut = oracle.clipped(raw);
      for (std::size_t r = 0; r < std::size_t(world); ++r)
        for (std::size_t p = 0; p < kNumel.size(); ++p)
          if (kCompressed[p]) ++(raw.grad[r][p] == cut.grad[r][p] ? whole : clipped);
      EXPECT_TRUE(clipped > 0 && whole > 0) << clipped << " gradients are clipped, " << whole << " are not";
      follow({target, options}, world, DType::fp32, world % 2 == 0 ? kOneBucket : kThree, grad);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(TwoPhase, NonfiniteGradientsPoisonNothing) {
  const auto grad = [&](int step, int rank, std::uint32_t p) {
    Vec g = numbers(real_number, 8, kParameters)(step, rank, p);
    if (step == 2 && rank == 1 && p == 3) g[700] = NAN, g[17999] = -INFINITY;
    if (step == 3 && rank == 0 && p == 1) g[4] = INFINITY;
    return g;
  };
  for (const Case& c : kCases)
    for (const int world : {2, 3}) follow(c, world, DType::fp32, kThree, grad);
}

TEST(TwoPhase, BytesAreOnePerEightElementsAndPhase) {
  // P/8N + scales + header, twice, to N - 1 ranks; nothing else.
  for (const int world : {2, 4}) {
    const std::vector<Parameter> parameters = {{"w", {1024, 64}}};
    const std::size_t n = 65536, part = n / std::size_t(world);
    const Outcome out = play({.world = world,
                              .config = "codec=sign feedback=ef14",
                              .parameters = parameters,
                              .steps = 3,
                              .grad = numbers(real_number, 1, parameters)});
    const double each = double(part / 8 + 4 * (part / 1024) + 64);
    EXPECT_EQ(out.stats[0].wire_bytes, 3 * 2.0 * (world - 1) * each);
    EXPECT_EQ(out.stats[0].payload_bytes, std::uint64_t(3 * (world + 1) * each));
    EXPECT_GE(out.stats[0].factor, 30);
    EXPECT_EQ(out.stats[0].parameters[0].kept, n);
    EXPECT_TRUE(out.stats[0].parameters[0].compressed);
  }
}

TEST(TwoPhase, AWorldOfOneIsExact) {
  const auto grad = numbers(real_number, 2, kParameters);
  const Outcome out = play({.config = "onebit_adam:freeze=1 min_numel=1", .parameters = kParameters, .steps = 4, .grad = grad});
  for (std::uint32_t p = 0; p < kNumel.size(); ++p) {
    Vec m(kNumel[p], 0.0f);
    for (int t = 0; t < 4; ++t) {
      const Vec g = grad(t, 0, p);
      for (std::size_t i = 0; i < m.size(); ++i) m[i] = 0.9f * m[i] + (1.0f - 0.9f) * g[i];
      EXPECT_TRUE(same_bits(out.mean[std::size_t(t)][0][p], t == 0 || !kCompressed[p] ? g : m)) << "step " << t << " parameter " << p;
    }
    if (kCompressed[p]) EXPECT_TRUE(same_bits(out.array(0, kParameters[p].name, "momentum"), m));
  }
  EXPECT_EQ(out.stats[0].wire_bytes, 0);
}

// Whatever the dense step does not leave out is in the mean: all that was fed in has come out, to the bit on dyadic numbers (l1 over blocks
// of 8, all of them whole: scales are multiples of 1/32 after one step, so three steps stay within fp32).
TEST(TwoPhase, AFlushSendsEverything) {
  const std::vector<Parameter> parameters = {{"a", {32, 32}}, {"bias", {17}}, {"b", {3, 6000}}};
  const std::vector<std::size_t> numel = {1024, 17, 18000};
  for (const int world : {2, 4}) {
    const auto grad = numbers(dyadic_number, 4, parameters);
    const Outcome out = play({.world = world,
                              .config = "codec=sign:block=8 feedback=ef14 min_numel=1",
                              .parameters = parameters,
                              .steps = 3,
                              .grad = grad,
                              .buckets =
                                  [](int) {
                                    return std::vector<Ids>{{2, 1}, {0}};
                                  },
                              .before_step =
                                  [](GradientReducer& reducer, int step, int) {
                                    if (step == 2) reducer.flush();
                                  }});
    for (std::uint32_t p = 0; p < 3; ++p) {
      std::vector<double> fed(numel[p]), got(numel[p]);
      for (std::size_t t = 0; t < 3; ++t) {
        for (std::size_t i = 0; i < fed.size(); ++i) got[i] += out.mean[t][0][p][i];
        for (int r = 0; r < world; ++r) {
          const Vec g = grad(int(t), r, p);
          for (std::size_t i = 0; i < fed.size(); ++i) fed[i] += double(g[i]) / world;
        }
      }
      EXPECT_EQ(got, fed) << "world " << world << " parameter " << p;
      if (p == 1) continue;
      for (int r = 0; r < world; ++r)
        for (const char* name : {"residual", "server_residual"})
          for (const float x : out.array(r, parameters[p].name, name)) ASSERT_EQ(x, 0.0f) << name;
    }
  }
}

TEST(TwoPhase, BucketsDecideNothing) {
  for (const char* config : {"codec=sign feedback=ef14 min_numel=1", "onebit_adam:freeze=1 min_numel=1"}) {
    for (const int world : {2, 3}) {
      const auto grad = numbers(real_number, 9, kParameters);
      Scenario s{.world = world, .config = config, .parameters = kParameters, .steps = 4, .grad = grad};
      const Outcome one = play(s);
      s.buckets = [](int step) { return step % 2 == 0 ? kThree : std::vector<Ids>{{4, 3}, {0}, {1}, {2}}; };
      const Outcome several = play(s);
      expect_same_means(one, several);
      expect_same_state(one.state, several.state);
    }
  }
}

TEST(TwoPhase, ResumesToTheBit) {
  for (const char* config : {"codec=sign:block=64 feedback=ef14 min_numel=1", "onebit_adam:freeze=2 min_numel=1"}) {
    const auto grad = numbers(real_number, 6, kParameters);
    Scenario s{.world = 3, .config = config, .parameters = kParameters, .steps = 6, .grad = grad};
    const Outcome whole = play(s);
    s.steps = 3;
    const Outcome first = play(s);
    s.start = first.state;
    s.grad = [&](int step, int rank, std::uint32_t p) { return grad(step + 3, rank, p); };
    s.buckets = [](int) { return kThree; };
    const Outcome rest = play(s);
    for (std::size_t t = 0; t < 3; ++t)
      for (std::size_t p = 0; p < kNumel.size(); ++p) EXPECT_TRUE(same_bits(rest.mean[t][2][p], whole.mean[t + 3][2][p])) << t << " " << p;
    expect_same_state(rest.state, whole.state);
  }
}

// Under EF14 owners hold back gradient as the workers do, and both keep its worth at another learning rate.
TEST(TwoPhase, AnotherLearningRateRescalesOwnersToo) {
  const auto grad = numbers(real_number, 6, kParameters);
  Scenario s{.world = 3, .config = "codec=sign:block=64 feedback=ef14 min_numel=1", .parameters = kParameters, .steps = 3, .grad = grad};
  s.after_step = [](GradientReducer& reducer, int step, int) {
    if (step != 2) return;
    const ReducerState before = reducer.state();
    reducer.rescale_residuals(std::vector<float>(kParameters.size(), 4.0f));
    const ReducerState after = reducer.state();
    for (const auto& [name, arrays] : before.parameters)
      for (const auto& [array, values] : arrays) {
        double held = 0;
        for (std::size_t i = 0; i < values.size(); ++i) {
          EXPECT_EQ(after.parameters.at(name).at(array)[i], 4 * values[i]) << name << "." << array << " element " << i;
          held += std::fabs(values[i]);
        }
        EXPECT_TRUE(held > 0 || values.size() < 2) << name << "." << array << " is empty, so nothing was shown";
      }
  };
  (void)play(s);
}

TEST(TwoPhase, OwnedPartsAreCutAnewForAnotherWorld) {
  const auto grad = numbers(real_number, 6, kParameters);
  const Outcome four =
      play({.world = 4, .config = "onebit_adam:freeze=1 min_numel=1", .parameters = kParameters, .steps = 3, .grad = grad});
  Scenario s;
  s.world = 2;
  s.config = "onebit_adam:freeze=1 min_numel=1";
  s.parameters = kParameters;
  s.steps = 0;
  s.grad = grad;
  s.start = four.state;
  const Outcome two = play(s);
  s.world = 4;
  s.start = two.state;
  const Outcome back = play(s);
  const auto whole = [](const Outcome& out, const std::string& name) {
    Vec all;
    for (const ReducerState& state : out.state) {
      const Vec& part = state.parameters.at(name).at("server_residual");
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  };
  for (std::size_t p = 0; p < kNumel.size(); ++p) {
    if (!kCompressed[p]) continue;
    const std::string& name = kParameters[p].name;
    EXPECT_EQ(whole(four, name).size(), kNumel[p]);
    EXPECT_TRUE(same_bits(whole(two, name), whole(four, name))) << name;
    EXPECT_TRUE(same_bits(whole(back, name), whole(four, name))) << name;
    EXPECT_TRUE(same_values(two.array(1, name, "momentum"), four.array(0, name, "momentum"))) << name;
    for (std::size_t i = 0; i < kNumel[p]; ++i) {
      double mean = 0;
      for (int r = 0; r < 4; ++r) mean += four.array(r, name, "residual")[i];
      ASSERT_EQ(two.array(0, name, "residual")[i], float(mean / 4));
    }
  }
  EXPECT_TRUE(two.state[0].frozen.has_value());
  EXPECT_EQ(*two.state[0].frozen, 1u);
}

}  // namespace
}  // namespace thinwire::test
