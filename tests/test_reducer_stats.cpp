// Counters against numbers computed by hand, passes, and clipping through the reducer.

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/reducer_oracle.hpp"
#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

const std::vector<Parameter> kModel = {{"w", {6, 10}}, {"bias", {6}}};
const char* const kDgc = "codec=topk:density=0.1,select=exact,index=u32 feedback=dgc exchange=gather min_numel=1";

Scenario scenario(int world, const std::string& config, int steps, const std::vector<Parameter>& model = kModel) {
  return {.world = world, .config = config, .parameters = model, .steps = steps, .grad = numbers(dyadic_number, 2, model)};
}

// One bucket: header 64, one count 4, 6 entries of 4 + 4 bytes, 6 fp32 passengers: 64 + 4 + 48 + 24 = 140, padded to 192.
TEST(ReducerStats, BytesOfACompressedStep) {
  for (const int world : {1, 2, 4}) {
    const Outcome out = play(scenario(world, kDgc, 3));
    for (const Stats& s : out.stats) {
      EXPECT_EQ(s.payload_bytes, 3 * 192u);
      EXPECT_EQ(s.wire_bytes, 3 * 192.0 * (world - 1));
      EXPECT_DOUBLE_EQ(s.dense_bytes, 3 * 66 * 4 * 2.0 * (world - 1) / world);
      EXPECT_DOUBLE_EQ(s.factor, world == 1 ? 1.0 : (66 * 4 * 2.0 / world) / 192);
      EXPECT_EQ(s.step, 3u);
    }
  }
}

// Two buckets: one with the payload alone, 116 padded to 128; one with an empty payload, 64, and 24 bytes beside it: 128.
TEST(ReducerStats, BytesOfTwoBuckets) {
  Scenario s = scenario(2, kDgc, 1);
  s.buckets = [](int) { return std::vector<Ids>{{1}, {0}}; };
  EXPECT_EQ(play(s).stats[1].payload_bytes, 256u);
}

// bf16 values, 16-bit indices (one block: 4 bytes and 6 offsets of 2): 64 + 4 + 16 + 12 = 96; bias is not stateful: 6 bf16, 12 bytes.
TEST(ReducerStats, BytesFollowTheWireAndTheGradientsType) {
  Scenario s = scenario(2, "codec=topk:density=0.1,select=exact,index=u16,wire=bf16 feedback=ef14 exchange=gather min_numel=1", 1);
  s.dtype = DType::bf16;
  const Stats stats = play(s).stats[0];
  EXPECT_EQ(stats.payload_bytes, 128u);
  EXPECT_DOUBLE_EQ(stats.dense_bytes, 132.0);
}

// 20000 passengers at world 2: 10000 floats to each owner, 80000 bytes all-to-all of which half leaves; then payload 116 and 40000 bytes.
TEST(ReducerStats, BytesThroughOwners) {
  const Stats stats = play(scenario(2, kDgc, 1, {{"w", {6, 10}}, {"bias", {20000}}})).stats[0];
  EXPECT_EQ(stats.payload_bytes, 80000u + 40128u);
  EXPECT_DOUBLE_EQ(stats.wire_bytes, 40000 + 40128.0);
}

TEST(ReducerStats, BytesOfDenseSteps) {
  // With a codec: fp32 messages and one element for the verdict. Without: the gradient as it is.
  const Stats dense = play(scenario(4, std::string(kDgc) + " start_step=5", 2)).stats[0];
  EXPECT_EQ(dense.payload_bytes, 2 * 4 * 67u);
  EXPECT_DOUBLE_EQ(dense.wire_bytes, 2 * 4 * 67 * 1.5);
  Scenario s = scenario(4, "codec=none", 2);
  const Stats none = play(s).stats[0];
  EXPECT_EQ(none.payload_bytes, 2 * 4 * 66u);
  EXPECT_DOUBLE_EQ(none.wire_bytes, none.dense_bytes);
  EXPECT_DOUBLE_EQ(none.factor, 1.0);
  s.dtype = DType::fp16;
  EXPECT_EQ(play(s).stats[0].payload_bytes, 2 * 2 * 66u);
}

TEST(ReducerStats, FingerprintsOfReplicasAreCountedThoseOfConfigsAreNot) {
  const Stats with = play(scenario(2, std::string(kDgc) + " check_every=2", 4)).stats[0];
  EXPECT_EQ(with.payload_bytes, 4 * 192u + 2 * 8);
}

TEST(ReducerStats, NormsAndKept) {
  Scenario s = scenario(2, kDgc, 4);
  s.options = [](int, int) { return ReduceOptions{.loss_scale = 4}; };
  const Outcome out = play(s);
  for (int r = 0; r < 2; ++r) {
    const Stats& stats = out.stats[std::size_t(r)];
    for (const std::uint32_t p : {0u, 1u}) {
      double squares = 0;
      const int step = test_device() < 0 ? 3 : 0;  // on a GPU norms are taken every 16th step
      for (const float g : s.grad(step, r, p)) squares += double(g / 4) * double(g / 4);
      EXPECT_DOUBLE_EQ(stats.parameters[p].grad_norm, std::sqrt(squares));
    }
    double squares = 0;
    for (const float v : out.array(r, "w", "accumulated")) squares += double(v) * double(v);
    EXPECT_GT(squares, 0);
    EXPECT_NEAR(stats.parameters[0].residual_norm, std::sqrt(squares), 1e-12 * std::sqrt(squares));
    EXPECT_EQ(stats.parameters[1].residual_norm, 0.0);
    EXPECT_EQ(stats.parameters[0].kept, 6u);
    EXPECT_EQ(stats.parameters[0].name, "w");
    EXPECT_EQ(stats.parameters[0].numel, 60u);
  }
  Scenario zero = scenario(2, kDgc, 1);
  zero.grad = [](int, int, std::uint32_t p) { return Vec(numel_of(kModel[p])); };
  EXPECT_EQ(play(zero).stats[0].parameters[0].kept, 0u);  // zeros are never sent
}

// ---- pass()

TEST(ReducerPass, CountsForTheStepRunsInOrderAndSaysWhy) {
  for (const bool inline_queue : {false, true})
    run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
      ReducerOptions options;
      options.inline_queue = inline_queue;
      GradientReducer reducer(communicator, Config::parse(kDgc), {{"w", {6, 10}}, {"sparse", {100, 8}}, {"bias", {6}}}, options);
      std::vector<int> order;
      for (int step = 0; step < 3; ++step) {
        Vec w(60, 1.0f), bias(6, 1.0f), sparse(800, 1.0f);
        Work one = reducer.reduce(Ids{2}, host_bytes(bias.data(), 6));
        if (step < 2) {
          Work two = reducer.pass(Ids{1}, "sparse gradient", [&] {
            order.push_back(step);
            return true;
          });
          two.wait();
        } else {
          reducer.reduce(Ids{1}, host_bytes(sparse.data(), 800)).wait();
        }
        EXPECT_EQ(reducer.step(), std::uint64_t(step));
        Work three = reducer.reduce(Ids{0}, host_bytes(w.data(), 60));
        three.wait();
        EXPECT_EQ(reducer.step(), std::uint64_t(step + 1));
        const Stats stats = reducer.stats();
        EXPECT_EQ(stats.parameters[1].reason, step < 2 ? "sparse gradient" : "");
        EXPECT_EQ(stats.parameters[1].compressed, step == 2);
        EXPECT_EQ(stats.parameters[1].kept, step < 2 ? 0u : 80u);
      }
      EXPECT_EQ(order, (std::vector<int>{0, 1}));
      // The last one of a step may be a pass, and its exchange may be empty.
      Vec both(66, 1.0f);
      reducer.reduce(Ids{0, 2}, host_bytes(both.data(), 66)).wait();
      reducer.pass(Ids{1}, "nothing to do", nullptr).wait();
      EXPECT_EQ(reducer.stats().step, 4u);
      communicator->barrier();
    });
}

TEST(ReducerPass, LeavesTheStateOfItsParametersAlone) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    GradientReducer reducer(communicator, Config::parse(kDgc), kModel);
    Vec all(66, 1.0f);
    reducer.reduce(Ids{0, 1}, host_bytes(all.data(), 66)).wait();
    const ReducerState before = reducer.state();
    reducer.pass(Ids{1, 0}, "nothing", nullptr).wait();
    expect_same_state({reducer.state()}, {before});
    EXPECT_EQ(reducer.step(), 2u);
  });
}

// ---- clipping

// Dyadic norms and limits, so that factors are exact: N = 4, three tensors of 64, 64 and 128 elements, c = 2: limits 2, 2 and sqrt(8).
TEST(ReducerClipping, FollowsTheOracle) {
  const std::vector<Parameter> model = {{"w", {8, 8}}, {"bias", {64}}, {"rest", {128}}};
  Scenario s{.world = 4,
             .config = "codec=topk:density=0.1,select=exact feedback=dgc:momentum=0.5,clip_norm=2 exchange=gather min_numel=1 start_step=2",
             .parameters = model,
             .steps = 6,
             .grad = [](int step, int rank, std::uint32_t p) {
               // 64 elements of ±1/2: norm 4, clipped to 2 where p is not `rest`; rank 0 stays below the limit with ±1/8: norm 1
               Vec g(p == 2 ? 128 : 64);
               for (std::size_t i = 0; i < g.size(); ++i) {
                 const bool sign = (draw(5, std::uint64_t(step), std::uint64_t(rank), p, i) >> 63) != 0;
                 g[i] = (p == 2 || rank == 0 ? 0.125f : 0.5f) * (sign ? 1.0f : -1.0f);
               }
               if (step == 4 && rank == 2 && p == 0) g[5] = std::numeric_limits<float>::infinity();  // the norm is over the finite ones
               return g;
             }};
  const Outcome out = play(s);
  Oracle oracle(4, {64, 64, 128}, {.feedback = Oracle::Feedback::dgc, .rate = 0.5f, .clip_norm = 2});
  for (int t = 0; t < 6; ++t) {
    const auto w = t < 2 ? Oracle::Way::dense : Oracle::Way::sparse;
    Oracle::Step step{.way = {w, Oracle::Way::never, Oracle::Way::never}, .k = {7, 0, 0}, .buckets = {{0, 1, 2}}};
    for (int r = 0; r < 4; ++r) step.grad.push_back({s.grad(t, r, 0), s.grad(t, r, 1), s.grad(t, r, 2)});
    const auto mean = oracle.step(step);
    for (std::uint32_t p = 0; p < 3; ++p) ASSERT_TRUE(same_values(out.mean[std::size_t(t)][3][p], mean[p])) << t << " " << p;
  }
  // The clipped step really was clipped: the dense mean of rank-equal signs would be larger.
  const Outcome unclipped = [&] {
    Scenario u = s;
    u.config = "codec=topk:density=0.1,select=exact feedback=dgc:momentum=0.5 exchange=gather min_numel=1 start_step=2";
    return play(u);
  }();
  EXPECT_FALSE(same_values(out.mean[0][0][0], unclipped.mean[0][0][0]));
  EXPECT_TRUE(same_values(out.mean[0][0][2], unclipped.mean[0][0][2]));
  EXPECT_EQ(out.stats[1].parameters[0].grad_norm, 4.0);  // of the gradient as it came
}

}  // namespace
}  // namespace thinwire::test
