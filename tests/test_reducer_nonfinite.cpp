// A NaN or an infinity anywhere poisons nothing and loses nothing; with a grad scaler the whole step is taken back.

#include <gtest/gtest.h>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

using Way = Oracle::Way;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

const std::vector<Parameter> kModel = {{"w", {8, 10}}, {"bias", {6}}, {"other", {4, 30}}, {"tail", {9}}};
const std::vector<std::size_t> kNumel = {80, 6, 120, 9};
const std::vector<Ids> kBuckets = {{3, 2}, {0, 1}};

struct Accident {
  int step, rank;
  std::uint32_t parameter;
  std::size_t element;
  float value;
};

struct Case {
  std::string feedback;
  Oracle::Options options;
};
const Case kCases[] = {
    {"dgc:momentum=0.5", {.feedback = Oracle::Feedback::dgc, .rate = 0.5f}},
    {"dgc:momentum=0.5,mask=0,nesterov=1", {.feedback = Oracle::Feedback::dgc, .rate = 0.5f, .nesterov = true, .mask = false}},
    {"ef14", {.feedback = Oracle::Feedback::ef14, .rate = 1.0f}},
    {"none", {.feedback = Oracle::Feedback::none}},
};

/// Plays a scenario of kModel and compares every mean and the last state with the oracle. `start_step` steps are dense.
void follow(Scenario s, Oracle::Options options, int start_step, const std::vector<std::vector<bool>>& joined = {}) {
  s.parameters = kModel;
  s.buckets = [](int) { return kBuckets; };
  const Outcome out = play(s);
  expect_replicas_agree(out);
  options.dtype = s.dtype;
  options.step_verdict = s.reducer.step_verdict;
  Oracle oracle(s.world, kNumel, options);
  for (int t = 0; t < s.steps; ++t) {
    const Way w = t < start_step ? Way::dense : Way::sparse;
    Oracle::Step step{.way = {w, Way::never, w, Way::never}, .k = {8, 0, 12, 0}, .buckets = kBuckets};
    for (int r = 0; r < s.world; ++r) {
      auto& g = step.grad.emplace_back();
      for (std::uint32_t p = 0; p < 4; ++p) g.push_back(s.grad(t, r, p));
    }
    if (s.options) step.scale = s.options(t, 0).loss_scale;
    if (!joined.empty()) step.joined = joined[std::size_t(t)];
    const auto mean = oracle.step(step);
    for (std::uint32_t p = 0; p < 4; ++p)
      ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][p], mean[p])) << "step " << t << " " << kModel[p].name;
  }
  for (int r = 0; r < s.world; ++r)
    for (std::uint32_t p = 0; p < 4; ++p)
      for (const auto& [name, values] : out.state[std::size_t(r)].parameters.at(kModel[p].name)) {
        ASSERT_TRUE(same_values(values, name == "momentum" ? oracle.momentum(r, p) : oracle.residual(r, p)))
            << "rank " << r << " " << kModel[p].name << "." << name;
        for (const float x : values) ASSERT_TRUE(std::isfinite(x));
      }
  EXPECT_EQ(out.stats[0].nonfinite_steps, std::uint64_t(oracle.bad_steps()));
  EXPECT_EQ(out.stats.back().nonfinite_steps, std::uint64_t(oracle.bad_steps()));
}

Scenario with_accidents(int world, const std::string& config, int steps, const std::vector<Accident>& accidents) {
  Scenario s{.world = world, .config = config, .parameters = kModel, .steps = steps, .grad = nullptr};
  s.grad = [=, plain = numbers(dyadic_number, 3, kModel)](int step, int rank, std::uint32_t p) {
    Vec g = plain(step, rank, p);
    for (const Accident& a : accidents)
      if (a.step == step && a.rank == rank && a.parameter == p) g[a.element] = a.value;
    return g;
  };
  return s;
}

std::string config_of(const std::string& feedback, const std::string& more = "") {
  return "codec=topk:density=0.1,select=exact exchange=gather min_numel=7 feedback=" + feedback + more;
}

TEST(ReducerNonfinite, TheBucketIsNanOnAllRanksAndTheOtherIsFine) {
  for (const std::uint32_t place : {0u, 1u}) {
    Scenario s = with_accidents(3, config_of("dgc"), 2, {{0, 1, place, 5, kNan}});
    s.buckets = [](int) { return kBuckets; };
    const Outcome out = play(s);
    for (std::size_t r = 0; r < 3; ++r) {
      EXPECT_TRUE(all_nan(out.mean[0][r][0]));
      EXPECT_TRUE(all_nan(out.mean[0][r][1]));
      for (const std::uint32_t p : {2u, 3u})
        for (const float x : out.mean[0][r][p]) EXPECT_TRUE(std::isfinite(x));
      for (const Vec& mean : out.mean[1][r])
        for (const float x : mean) EXPECT_TRUE(std::isfinite(x));
      EXPECT_EQ(out.stats[r].nonfinite_steps, 1u);
    }
  }
}

TEST(ReducerNonfinite, CompressedStepsFollowTheOracle) {
  for (const Case& c : kCases)
    for (const int world : {1, 2, 3, 4, 7}) {
      SCOPED_TRACE(c.feedback + " world " + std::to_string(world));
      // Step 1: a compressed tensor; 2: a passenger; 3: both buckets; 5: two ranks, opposite infinities at one place.
      follow(with_accidents(world, config_of(c.feedback), 8,
                            {{1, 0, 0, 79, kNan},
                             {2, world - 1, 1, 0, -kInf},
                             {3, 0, 2, 0, kInf},
                             {3, world - 1, 0, 1, kNan},
                             {5, 0, 0, 3, kInf},
                             {5, world - 1, 0, 3, -kInf}}),
             c.options, 0);
      if (testing::Test::HasFailure()) return;
    }
}

TEST(ReducerNonfinite, DenseStepsFollowTheOracle) {
  for (const Case& c : kCases)
    for (const int world : {1, 2, 3}) {
      SCOPED_TRACE(c.feedback + " world " + std::to_string(world));
      // The last dense step is bad too: what it held back goes with the first compressed one.
      follow(with_accidents(world, config_of(c.feedback, " start_step=4"), 8,
                            {{1, 0, 0, 7, kNan}, {3, world - 1, 1, 2, kInf}, {3, 0, 2, 2, kInf}}),
             c.options, 4);
      if (testing::Test::HasFailure()) return;
    }
}

// Nothing in the inputs is infinite, but the mean does not fit fp16.
TEST(ReducerNonfinite, AMeanThatOverflowsFp16IsABadStepForAll) {
  for (const Case& c : kCases)
    for (const std::uint32_t place : {0u, 1u}) {
      Scenario s = with_accidents(2, config_of(c.feedback), 4, {});
      s.dtype = DType::fp16;
      s.grad = [plain = s.grad, place](int step, int rank, std::uint32_t p) {
        Vec g = plain(step, rank, p);
        // momentum and residual pile up: 49152 (1 + 1/2 + 1) is beyond 65504, the gradient itself is not
        if (p == place && step < 3) g[3] = 49152;
        return g;
      };
      SCOPED_TRACE(c.feedback + " " + std::to_string(place));
      follow(s, c.options, 0);
    }
}

TEST(ReducerNonfinite, ThroughOwnersToo) {
  for (const std::string feedback : {"dgc:momentum=0.5", "ef14"}) {
    Scenario s{.world = 3, .config = config_of(feedback), .parameters = {{"w", {8, 10}}, {"long", {50000}}}, .steps = 3, .grad = nullptr};
    s.grad = [plain = numbers(dyadic_number, 3, s.parameters)](int step, int rank, std::uint32_t p) {
      Vec g = plain(step, rank, p);
      if (step == 0 && rank == 1 && p == 1) g[49999] = kNan;
      if (step == 2 && rank == 2 && p == 0) g[0] = kInf;
      return g;
    };
    const Outcome out = play(s);
    expect_replicas_agree(out);
    for (const std::size_t t : {0, 2})
      for (std::size_t r = 0; r < 3; ++r)
        for (const Vec& mean : out.mean[t][r]) EXPECT_TRUE(all_nan(mean));
    for (const float x : out.mean[1][0][1]) ASSERT_TRUE(std::isfinite(x));
    EXPECT_EQ(out.stats[1].nonfinite_steps, 2u);
  }
}

TEST(ReducerNonfinite, CodecNone) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
    Scenario s = with_accidents(2, "codec=none", 2, {{0, 1, 0, 9, kInf}});
    s.dtype = dtype;
    s.buckets = [](int) { return kBuckets; };
    const Outcome out = play(s);
    for (std::size_t r = 0; r < 2; ++r) {
      EXPECT_TRUE(all_nan(out.mean[0][r][0]));
      EXPECT_TRUE(all_nan(out.mean[0][r][1]));
      for (const float x : out.mean[0][r][2]) EXPECT_TRUE(std::isfinite(x));
      EXPECT_EQ(out.stats[r].nonfinite_steps, 1u);
    }
  }
}

// ---- with a grad scaler the unit is the step

TEST(ReducerStepVerdict, EveryBucketTakesBackAtTheStepsEnd) {
  for (const Case& c : kCases)
    for (const int world : {1, 2, 3})
      for (const int start : {0, 2}) {
        SCOPED_TRACE(c.feedback + " world " + std::to_string(world) + " start_step " + std::to_string(start));
        // The bad bucket is the last in step 4 and the first in step 6: the other one must return all the same.
        Scenario s = with_accidents(world, config_of(c.feedback, " start_step=" + std::to_string(start)), 9,
                                    {{1, 0, 0, 3, kNan}, {4, world - 1, 0, 2, kInf}, {6, 0, 3, 1, kNan}});
        s.reducer.step_verdict = true;
        follow(s, c.options, start);
        if (testing::Test::HasFailure()) return;
      }
}

// Scalers start far too high: everything before the first finite step leaves no trace, not even in momentum.
TEST(ReducerStepVerdict, StateStartsWithTheFirstFiniteStep) {
  for (const Case& c : kCases) {
    Scenario s = with_accidents(2, config_of(c.feedback), 3, {{0, 1, 0, 3, kInf}, {1, 0, 3, 3, kInf}});
    s.reducer.step_verdict = true;
    Scenario late = s;
    late.steps = 1;
    late.grad = [grad = s.grad](int, int rank, std::uint32_t p) { return grad(2, rank, p); };
    const Outcome out = play(s), fresh = play(late);
    for (std::uint32_t p = 0; p < 4; ++p) EXPECT_TRUE(same_bits(out.mean[2][0][p], fresh.mean[0][0][p])) << c.feedback;
    expect_same_state(out.state, fresh.state);
    follow(s, c.options, 0);
  }
  Scenario never = with_accidents(2, config_of("dgc"), 1, {{0, 1, 0, 3, kInf}});
  never.reducer.step_verdict = true;
  const Outcome out = play(never);
  EXPECT_FALSE(out.state[0].started);
  for (const auto& [name, arrays] : out.state[0].parameters)
    for (const auto& [array, values] : arrays) EXPECT_EQ(values, Vec(values.size(), 0.0f)) << name << "." << array;
}

// The scale changes from step to step; the state is in true units, the mean in those of its step. Powers of two: exact.
TEST(ReducerStepVerdict, StateIsUnscaledWhateverTheScaleDoes) {
  const auto scale_at = [](int step) { return step < 2 ? 65536.0f : step == 5 ? 1.0f : 128.0f; };
  for (const Case& c : kCases)
    for (const bool verdict : {false, true})
      for (const int start : {0, 3}) {
        Scenario s = with_accidents(2, config_of(c.feedback, " start_step=" + std::to_string(start)), 8, {{3, 0, 0, 3, kInf}});
        s.scale_in_memory = start == 0;  // of a GPU
        Scenario plain = s;
        s.grad = [=, grad = s.grad](int step, int rank, std::uint32_t p) {
          Vec g = grad(step, rank, p);
          for (float& x : g) x *= scale_at(step);
          return g;
        };
        s.options = [=](int step, int) { return ReduceOptions{.loss_scale = scale_at(step)}; };
        s.reducer.step_verdict = plain.reducer.step_verdict = verdict;
        SCOPED_TRACE(c.feedback);
        follow(s, c.options, start);
        const Outcome scaled = play(s), unscaled = play(plain);
        expect_same_state(scaled.state, unscaled.state);
        for (std::size_t t = 0; t < 8; ++t)
          for (std::uint32_t p = 0; p < 4; ++p)
            for (std::size_t i = 0; i < kNumel[p]; ++i) {
              const float a = scaled.mean[t][0][p][i], b = unscaled.mean[t][0][p][i] * scale_at(int(t));
              ASSERT_TRUE(a == b || (a != a && b != b)) << t << " " << p << " " << i;
            }
        EXPECT_EQ(scaled.stats[0].parameters[0].grad_norm, unscaled.stats[0].parameters[0].grad_norm);
      }
}

// ---- joined ranks

/// A gradient that others reduce (sparse rows) takes part: the optimizer skips the whole step for it.
TEST(ReducerStepVerdict, APassedGradientThatIsNotFiniteTakesTheStepBack) {
  run_ranks(2, [](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse("codec=topk:density=0.1 feedback=ef14 exchange=gather min_numel=1"),
                            {{"w", {8, 10}}, {"rows", {100, 8}}}, {.step_verdict = true});
    const auto step = [&](float value, bool finite) {
      std::vector<float> w(80);
      for (std::size_t i = 0; i < w.size(); ++i) w[i] = value * float(i + 1);
      reducer.reduce(Ids{0}, host_bytes(w.data(), w.size())).wait();
      reducer.pass(Ids{1}, "sparse gradient", [finite] { return finite; }, {.dense_bytes = 3200}).wait();
    };
    step(1.0f, true);
    const auto before = reducer.state().parameters.at("w").at("residual");
    step(2.0f, false);
    const auto after = reducer.state().parameters.at("w").at("residual");
    for (std::size_t i = 0; i < after.size(); ++i) ASSERT_EQ(after[i], before[i] + 2.0f * float(i + 1)) << i;  // nothing of it was applied
    EXPECT_EQ(reducer.stats().nonfinite_steps, 1u);
    EXPECT_EQ(reducer.stats().dense_bytes, 2.0 * (80 * 4 + 3200));  // two steps, ring of two
    communicator->barrier();
  });
}

TEST(ReducerJoined, SendsNothingKeepsItsStateAndTheDivisorStays) {
  for (const Case& c : kCases)
    for (const int world : {2, 3}) {
      for (const int start : {0, 6}) {  // dense steps as well
        Scenario s = with_accidents(world, config_of(c.feedback, " start_step=" + std::to_string(start)), 8, {{4, 0, 0, 1, kNan}});
        std::vector<std::vector<bool>> joined(8, std::vector<bool>(std::size_t(world), false));
        for (std::size_t t = 3; t < 6; ++t) joined[t].back() = true;  // the last rank runs out of data, and later another epoch begins
        s.options = [=](int step, int rank) { return ReduceOptions{.joined = joined[std::size_t(step)][std::size_t(rank)]}; };
        SCOPED_TRACE(c.feedback + " world " + std::to_string(world));
        follow(s, c.options, start, joined);
      }
    }
}

TEST(ReducerJoined, EverybodyJoinedIsAMeanOfZero) {
  Scenario s = with_accidents(2, config_of("dgc"), 2, {});
  s.options = [](int step, int) { return ReduceOptions{.joined = step == 1}; };
  const Outcome out = play(s);
  for (const Vec& mean : out.mean[1][0])
    for (const float x : mean) EXPECT_EQ(x, 0.0f);
}

TEST(ReducerJoined, UnderCodecNoneItsBucketCountsAsZeros) {
  Scenario s = with_accidents(2, "codec=none", 1, {});
  s.options = [](int, int rank) { return ReduceOptions{.joined = rank == 1}; };
  const Outcome out = play(s);
  for (std::size_t i = 0; i < 80; ++i) EXPECT_EQ(out.mean[0][1][0][i], s.grad(0, 0, 0)[i] / 2);
}

}  // namespace
}  // namespace thinwire::test
