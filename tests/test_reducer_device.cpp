// The same run in host and in device memory: equal means, states and payloads, to the bit. And what is refused.

#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

struct ReducerDevice : testing::Test {
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "there is no GPU, or this build has no CUDA";
  }
};

const std::vector<Parameter> kModel = {
    {"embedding", {300, 70}}, {"bias", {70}}, {"weight", {130, 129}}, {"large.norm", {20000}}, {"tiny", {3, 5}}};

void expect_same_run(Scenario s) {
  s.parameters = kModel;
  s.keep_payloads = true;
  s.grad = numbers(real_number, 11, kModel);
  s.buckets = [](int step) { return step == 0 ? std::vector<Ids>{{0, 1, 2, 3, 4}} : std::vector<Ids>{{4, 3}, {2, 1}, {0}}; };
  s.device = -1;
  const Outcome host = play(s);
  s.device = 0;
  const Outcome device = play(s);
  expect_same_means(host, device);
  expect_same_state(host.state, device.state);
  EXPECT_EQ(host.payloads, device.payloads);
  for (std::size_t r = 0; r < host.stats.size(); ++r) {
    EXPECT_EQ(host.stats[r].payload_bytes, device.stats[r].payload_bytes);
    EXPECT_EQ(host.stats[r].nonfinite_steps, device.stats[r].nonfinite_steps);
    for (std::size_t p = 0; p < kModel.size(); ++p) EXPECT_EQ(host.stats[r].parameters[p].kept, device.stats[r].parameters[p].kept);
  }
}

TEST_F(ReducerDevice, IsTheHostToTheBit) {
  for (const char* config :
       {"dgc:density=0.01 min_numel=100", "dgc:density=0.002,wire=bf16,select=exact,nesterov=1 min_numel=100 start_step=1",
        "dgc:density=0.01,clip_norm=0.5 min_numel=100 exchange=gather", "codec=topk:density=0.1,wire=fp16 feedback=ef14 min_numel=100",
        "codec=topk:density=0.01,index=bitmap feedback=ef14:decay=0.5 min_numel=100 check_every=2",
        "codec=topk:density=0.03 min_numel=100"}) {
    for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16}) {
      SCOPED_TRACE(std::string(config) + " " + to_string(dtype));
      Scenario s;
      s.world = dtype == DType::fp32 ? 3 : 2;
      s.config = config;
      s.steps = 4;
      s.dtype = dtype;
      expect_same_run(s);
    }
  }
}

TEST_F(ReducerDevice, LossScalesNonfiniteStepsAndJoinedRanksAreTheHostsToo) {
  for (const bool step_verdict : {false, true}) {
    Scenario s;
    s.world = 2;
    s.config = "dgc:density=0.01 min_numel=100";
    s.steps = 5;
    s.reducer.step_verdict = step_verdict;
    s.options = [](int step, int rank) {
      ReduceOptions options;
      options.loss_scale = step < 2 ? 1024.0f : 512.0f;
      options.joined = step == 4 && rank == 1;
      return options;
    };
    s.parameters = kModel;
    s.keep_payloads = true;
    const auto clean = numbers(real_number, 12, kModel);
    s.grad = [clean](int step, int rank, std::uint32_t p) {
      Vec g = clean(step, rank, p);
      if ((step == 0 || step == 3) && rank == 1 && p == 2) g[7] = std::numeric_limits<float>::infinity();
      return g;
    };
    s.device = -1;
    const Outcome host = play(s);
    s.device = 0;
    const Outcome device = play(s);
    for (std::size_t t = 0; t < host.mean.size(); ++t)
      for (std::size_t r = 0; r < 2; ++r)
        for (std::size_t p = 0; p < kModel.size(); ++p)
          ASSERT_TRUE(same_values(host.mean[t][r][p], device.mean[t][r][p])) << "step " << t << " parameter " << p;
    expect_same_state(host.state, device.state);
    EXPECT_EQ(host.payloads, device.payloads);
    EXPECT_EQ(device.stats[0].nonfinite_steps, 2u);
  }
}

TEST_F(ReducerDevice, RefusesBucketsOfAnotherPlace) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    ReducerOptions options;
    options.device = 0;
    GradientReducer reducer(communicator, Config::parse("dgc:density=0.1"), {{"w", {4}}}, options);
    GradBuffer grad(DType::fp32, 4);
    const DeviceStream stream(0);
    expect_error(Errc::invalid_argument, {"host memory", "GPU 0"}, [&] { reducer.reduce(Ids{0}, grad.view(), stream.get()); });
    expect_error(Errc::invalid_argument, {"stream", "host memory"},
                 [&] { reducer.reduce(Ids{0}, grad.on_device(0, stream.get()), Stream::host()); });
    GradientReducer host(communicator, Config::parse("dgc:density=0.1"), {{"w", {4}}});
    expect_error(Errc::invalid_argument, {"GPU 0", "host memory"},
                 [&] { host.reduce(Ids{0}, grad.on_device(0, stream.get()), Stream::host()); });
  });
}

TEST(ReducerHost, NeedsCudaForADevice) {
  if (device_count() != 0) GTEST_SKIP() << "there is a GPU";
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    ReducerOptions options;
    options.device = 0;
    EXPECT_THROW(GradientReducer(communicator, Config::parse("codec=none"), {{"w", {4}}}, options), Error);
  });
}

}  // namespace
}  // namespace thinwire::test
