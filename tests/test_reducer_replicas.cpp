// The result belongs to the parameters: the same bits on every rank, for every bucketing, whichever way passengers travel, and whether a
// thread or the caller does the work.

#include <gtest/gtest.h>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kModel = {{"conv.weight", {20, 9, 3}}, {"conv.bias", {20}}, {"norm", {33}},   {"fc.weight", {50, 41}},
                                       {"fc.bias", {50}},           {"scalar", {}},      {"head", {3, 1}}, {"empty", {0, 4}},
                                       {"embedding", {7, 300}}};

std::vector<Ids> one_giant(int) { return {{8, 7, 6, 5, 4, 3, 2, 1, 0}}; }
std::vector<Ids> per_parameter(int) { return {{8}, {7}, {6}, {5}, {4}, {3}, {2}, {1}, {0}}; }
std::vector<Ids> some(int) { return {{8, 6, 7}, {0, 1, 2}, {5, 4, 3}}; }
/// What DDP does: a giant first bucket, then another layout; here a third one later too.
std::vector<Ids> changing(int step) {
  return step == 0 ? one_giant(0) : step < 4 ? some(0) : step == 6 ? per_parameter(0) : std::vector<Ids>{{0, 2, 4, 8}, {1, 3, 5, 7, 6}};
}

Scenario scenario(int world, const std::string& config, DType dtype, int steps) {
  Scenario s{.world = world, .config = config, .parameters = kModel, .steps = steps, .dtype = dtype, .grad = nullptr};
  const auto plain = numbers(real_number, 31, kModel);
  s.grad = [=](int step, int rank, std::uint32_t p) {
    Vec g = plain(step, rank, p);
    for (float& x : g) x = as_type(x, dtype);
    return g;
  };
  return s;
}

const char* const kConfigs[] = {
    "codec=topk:density=0.02 feedback=dgc exchange=gather min_numel=3",
    "codec=topk:density=0.02,wire=bf16,select=exact feedback=dgc:momentum=0.7,nesterov=1,clip_norm=0.1 exchange=gather min_numel=3",
    "codec=topk:density=0.05,wire=fp16 feedback=ef14 min_numel=3", "codec=topk:density=0.3,select=exact min_numel=3",
    "codec=topk:density=0.01 feedback=dgc exchange=gather min_numel=3 start_step=2 policy=warmup:densities=0.25/0.06,steps=2"};

TEST(ReducerReplicas, TheBucketingLeavesNoTrace) {
  for (const char* config : kConfigs)
    for (const int world : {1, 3})
      for (const DType dtype : {DType::fp32, DType::bf16}) {
        SCOPED_TRACE(std::string(config) + " world " + std::to_string(world) + " " + to_string(dtype));
        Scenario s = scenario(world, config, dtype, 8);
        s.buckets = one_giant;
        const Outcome giant = play(s);
        expect_replicas_agree(giant);
        for (const auto& buckets : {per_parameter, some, changing}) {
          s.buckets = buckets;
          const Outcome other = play(s);
          expect_same_means(giant, other);
          expect_same_state(giant.state, other.state);
          if (HasFatalFailure()) return;
        }
      }
}

TEST(ReducerReplicas, CodecNoneIsTheMeanOnAllRanks) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16})
    for (const int world : {1, 2, 3, 4}) {
      Scenario s = scenario(world, "codec=none", dtype, 2);
      s.grad = numbers(dyadic_number, 2, kModel);  // whose sums are exact in any order and type
      s.buckets = changing;
      const Outcome out = play(s);
      expect_replicas_agree(out);
      for (std::uint32_t p = 0; p < kModel.size(); ++p) {
        Vec sum(numel_of(kModel[p]));
        for (int r = 0; r < world; ++r) {
          const Vec g = s.grad(1, r, p);
          for (std::size_t i = 0; i < g.size(); ++i) sum[i] += g[i];
        }
        // World 3 and 16 bit: each rank's third is rounded before the sum; 2^-8 (bf16) of the largest value 8 bounds every one of them and
        // the two sums' roundings.
        const float tolerance = world == 3 && dtype != DType::fp32 ? 5 * 8.0f / 256 : 1e-6f * 8;
        for (std::size_t i = 0; i < sum.size(); ++i) {
          if (world == 3) {
            ASSERT_NEAR(out.mean[1][0][p][i], sum[i] / 3, tolerance);
          } else {
            ASSERT_EQ(out.mean[1][0][p][i], as_type(sum[i] / float(world), dtype));
          }
        }
      }
      for (const auto& p : out.stats[0].parameters) EXPECT_EQ(p.reason, "codec=none");
    }
}

TEST(ReducerReplicas, ThreadOrCallerTheSameBits) {
  for (const char* config : kConfigs) {
    Scenario s = scenario(3, config, DType::fp32, 6);
    s.buckets = changing;
    const Outcome threaded = play(s);
    s.reducer.inline_queue = true;
    const Outcome inlined = play(s);
    expect_same_means(threaded, inlined);
    expect_same_state(threaded.state, inlined.state);
  }
}

// Sizes around the limit of 64 KiB: raw on one side, through owners on the other; with state (DGC) and without.
TEST(ReducerReplicas, PassengersGiveTheSameBitsRawAndThroughOwners) {
  for (const std::string feedback : {"dgc", "none"})
    for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16})
      for (const int world : {2, 3, 7}) {
        const std::size_t limit = 65536 / (feedback == "dgc" ? 4 : size_of(dtype));
        for (const std::size_t n : {limit - 1, limit, limit + 1}) {
          SCOPED_TRACE(feedback + " " + to_string(dtype) + " world " + std::to_string(world) + " n " + std::to_string(n));
          Scenario s{.world = world,
                     .config = "codec=topk:density=0.1,select=exact exchange=gather min_numel=1 feedback=" + feedback,
                     .parameters = {{"w", {4, 5}}, {"bias", {n}}, {"extra", {9}}},
                     .steps = 2,
                     .dtype = dtype,
                     .grad = nullptr};
          s.grad = [dtype, plain = numbers(real_number, 8, s.parameters)](int step, int rank, std::uint32_t p) {
            Vec g = plain(step, rank, p);
            for (float& x : g) x = as_type(x, dtype);
            return g;
          };
          s.buckets = [](int) { return std::vector<Ids>{{0, 1, 2}}; };  // bias and extra: above the limit for each of the three sizes
          const Outcome together = play(s);
          expect_replicas_agree(together);
          s.buckets = [](int) { return std::vector<Ids>{{1}, {2, 0}}; };
          const Outcome apart = play(s);
          expect_same_means(together, apart);
          expect_same_state(together.state, apart.state);
          const bool dgc = feedback == "dgc";
          Oracle oracle(world, {20, n, 9},
                        {.feedback = dgc ? Oracle::Feedback::dgc : Oracle::Feedback::none, .rate = 0.9f, .dtype = dtype});
          for (int t = 0; t < 2; ++t) {
            Oracle::Step step{.way = {Oracle::Way::sparse, Oracle::Way::never, Oracle::Way::never}, .k = {2, 0, 0}, .buckets = {{0, 1, 2}}};
            for (int r = 0; r < world; ++r) step.grad.push_back({s.grad(t, r, 0), s.grad(t, r, 1), s.grad(t, r, 2)});
            const auto mean = oracle.step(step);
            for (std::uint32_t p = 0; p < 3; ++p) ASSERT_TRUE(same_values(together.mean[std::size_t(t)][0][p], mean[p])) << p;
          }
        }
      }
}

// Invariant 7: who sits on which rank changes a mean by reassociation alone. A rank's state and payload know nothing of its number, and N
// numbers added in any order, then divided by N, are off by at most N roundings of their absolute sum over N each way: what every rank adds
// is what it gets alone.
TEST(ReducerReplicas, ShufflingTheRanksIsReassociation) {
  constexpr int kWorld = 5, kSteps = 6;
  const std::vector<int> shuffled = {3, 0, 4, 2, 1};
  for (const char* config : {"codec=topk:density=0.3 feedback=dgc exchange=gather min_numel=3",
                             "codec=topk:density=0.3,wire=bf16,select=exact feedback=ef14 exchange=gather min_numel=3 start_step=2"}) {
    SCOPED_TRACE(config);
    Scenario s = scenario(kWorld, config, DType::fp32, kSteps);
    s.keep_payloads = true;
    const auto grad = s.grad;
    const Outcome plain = play(s);
    s.grad = [&](int step, int rank, std::uint32_t p) { return grad(step, shuffled[std::size_t(rank)], p); };
    const Outcome other = play(s);
    std::vector<Outcome> alone;
    s.world = 1;
    for (int r = 0; r < kWorld; ++r) {
      s.grad = [&](int step, int, std::uint32_t p) { return grad(step, r, p); };
      alone.push_back(play(s));
    }
    for (int r = 0; r < kWorld; ++r) expect_same_state({other.state[std::size_t(r)]}, {plain.state[std::size_t(shuffled[std::size_t(r)])]});
    std::size_t moved = 0;
    for (std::size_t t = 0; t < kSteps; ++t)
      for (std::uint32_t p = 0; p < kModel.size(); ++p)
        for (std::size_t i = 0; i < plain.mean[t][0][p].size(); ++i) {
          double sum = 0;
          for (const Outcome& one : alone) sum += std::abs(double(one.mean[t][0][p][i]));
          const float a = plain.mean[t][0][p][i], b = other.mean[t][0][p][i];
          ASSERT_LE(std::abs(double(a) - double(b)), 2 * 1.001 * kWorld * 0x1p-24 * sum / kWorld) << t << " " << kModel[p].name << " " << i;
          moved += float_bits(a) != float_bits(b);
        }
    EXPECT_GT(moved, 0u) << "no order was seen";
  }
}

TEST(ReducerReplicas, ManyRanksAgreeWithTheOracle) {
  for (const int world : {4, 7}) {
    Scenario s = scenario(world, "codec=topk:density=0.02,select=exact feedback=dgc exchange=gather min_numel=3", DType::fp32, 10);
    s.buckets = some;
    const Outcome out = play(s);
    expect_replicas_agree(out);
    std::vector<std::size_t> numel, k;
    std::vector<Oracle::Way> way;
    for (const Parameter& p : kModel) {
      numel.push_back(numel_of(p));
      k.push_back(std::size_t(std::ceil(0.02 * double(numel.back()) - 1e-9)));
      way.push_back(p.shape.size() >= 2 && numel.back() >= 3 ? Oracle::Way::sparse : Oracle::Way::never);
    }
    Oracle oracle(world, numel, {.feedback = Oracle::Feedback::dgc, .rate = 0.9f});
    for (int t = 0; t < 10; ++t) {
      Oracle::Step step{.way = way, .k = k, .buckets = some(t)};
      for (int r = 0; r < world; ++r) {
        auto& g = step.grad.emplace_back();
        for (std::uint32_t p = 0; p < kModel.size(); ++p) g.push_back(s.grad(t, r, p));
      }
      const auto mean = oracle.step(step);
      for (std::uint32_t p = 0; p < kModel.size(); ++p) ASSERT_TRUE(same_values(out.mean[std::size_t(t)][0][p], mean[p])) << t << " " << p;
    }
  }
}

// A thousand steps on every world; each rank folds its means into a parameter vector as SGD would, and the vectors must agree to the bit.
class ReducerReplicasSlow : public testing::TestWithParam<int> {};

TEST_P(ReducerReplicasSlow, AThousandSteps) {
  const int world = GetParam();
  const std::vector<Parameter> model = {{"a", {30, 40}}, {"bias", {30}}, {"b", {3, 70}}};
  for (const char* config : {"codec=topk:density=0.01 feedback=dgc exchange=gather min_numel=1 check_every=7",
                             "codec=topk:density=0.02,wire=fp16,select=exact feedback=ef14 exchange=gather min_numel=1"}) {
    std::vector<std::vector<Vec>> weights(std::size_t(world), {Vec(1200), Vec(30), Vec(210)});
    run_ranks(world, [&](std::shared_ptr<Communicator> communicator) {
      const int rank = communicator->rank();
      GradientReducer reducer(communicator, Config::parse(config), model);
      const auto grad = numbers(real_number, 77, model);
      auto& own = weights[std::size_t(rank)];
      for (int step = 0; step < 1000; ++step) {
        Vec first, second;
        for (const std::uint32_t p : {2u, 1u}) {
          const Vec g = grad(step, rank, p);
          for (std::size_t i = 0; i < g.size(); ++i) first.push_back(g[i] + 0.1f * own[p][i]);
        }
        second = grad(step, rank, 0);
        for (std::size_t i = 0; i < second.size(); ++i) second[i] += 0.1f * own[0][i];
        const Ids a = {2, 1}, b = {0};
        Work one = reducer.reduce(a, host_bytes(first.data(), first.size()));
        Work two = reducer.reduce(b, host_bytes(second.data(), second.size()));
        two.wait();
        one.wait();
        for (std::size_t i = 0; i < 210; ++i) own[2][i] -= 0.05f * first[i];
        for (std::size_t i = 0; i < 30; ++i) own[1][i] -= 0.05f * first[210 + i];
        for (std::size_t i = 0; i < 1200; ++i) own[0][i] -= 0.05f * second[i];
      }
      EXPECT_EQ(reducer.stats().step, 1000u);
      EXPECT_EQ(reducer.stats().nonfinite_steps, 0u);
      communicator->barrier();
    });
    for (std::size_t r = 1; r < weights.size(); ++r)
      for (std::size_t p = 0; p < 3; ++p) ASSERT_TRUE(same_bits(weights[0][p], weights[r][p])) << "rank " << r;
    for (const float x : weights[0][0]) ASSERT_TRUE(std::isfinite(x));
  }
}
INSTANTIATE_TEST_SUITE_P(Worlds, ReducerReplicasSlow, testing::Values(1, 2, 3, 4, 7),
                         [](const auto& test) { return "World" + std::to_string(test.param); });

}  // namespace
}  // namespace thinwire::test
