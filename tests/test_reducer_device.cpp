// The same run in host and in device memory: equal means, states and payloads, to the bit. And what is refused.

#include <cmath>

#include "compressors/core/probe.hpp"
#include "compressors/core/registry.hpp"
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

/// What error feedback was seen to do, to the bit; and how the watchdog took it.
void expect_same_looks(const std::string& config, const Outcome& host, const Outcome& device) {
  const bool kept = can_probe(make_recursion(Config::parse(config)));
  for (std::size_t r = 0; r < host.stats.size(); ++r)
    for (std::size_t p = 0; p < kModel.size(); ++p) {
      const ParameterStats &a = host.stats[r].parameters[p], &b = device.stats[r].parameters[p];
      SCOPED_TRACE("rank " + std::to_string(r) + " " + a.name);
      if (kept) EXPECT_EQ(a.measured_delta, b.measured_delta);  // without state only the host decodes its payload once more
      if (!kept) EXPECT_FALSE(b.measured_delta);
      EXPECT_EQ(a.stale, b.stale);
      EXPECT_EQ(a.eta, b.eta);
      EXPECT_EQ(a.eta_cuts, b.eta_cuts);
    }
}

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
  expect_same_looks(s.config, host, device);
  for (std::size_t r = 0; r < host.stats.size(); ++r) {
    EXPECT_EQ(host.stats[r].payload_bytes, device.stats[r].payload_bytes);
    EXPECT_EQ(host.stats[r].nonfinite_steps, device.stats[r].nonfinite_steps);
    for (std::size_t p = 0; p < kModel.size(); ++p) EXPECT_EQ(host.stats[r].parameters[p].kept, device.stats[r].parameters[p].kept);
  }
}

/// The same for a run with steps that are not finite: NaN is NaN, and norms are those of step 0, which both take; to the bit but
/// for two phases.
void expect_same_with_accidents(Scenario s, std::uint64_t nonfinite_steps) {
  s.parameters = kModel;
  s.keep_payloads = true;
  std::vector<std::vector<double>> norms(std::size_t(s.world));
  s.after_step = [&norms](GradientReducer& reducer, int step, int rank) {
    if (step != 0) return;
    norms[std::size_t(rank)].clear();
    for (const ParameterStats& p : reducer.stats().parameters) norms[std::size_t(rank)].push_back(p.grad_norm);
  };
  s.device = -1;
  const Outcome host = play(s);
  const auto host_norms = norms;
  s.device = 0;
  const Outcome device = play(s);
  for (std::size_t t = 0; t < host.mean.size(); ++t)
    for (std::size_t r = 0; r < host.mean[t].size(); ++r)
      for (std::size_t p = 0; p < kModel.size(); ++p)
        ASSERT_TRUE(same_values(host.mean[t][r][p], device.mean[t][r][p])) << "step " << t << " rank " << r << " " << kModel[p].name;
  expect_same_state(host.state, device.state);
  EXPECT_EQ(host.payloads, device.payloads);
  expect_same_looks(s.config, host, device);
  for (std::size_t r = 0; r < norms.size(); ++r) {
    ASSERT_EQ(host_norms[r].size(), norms[r].size());
    // The host takes them from the pass, over two phases part by part: other fp32 sums of at most 64 + 6 terms.
    for (std::size_t p = 0; p < norms[r].size(); ++p) EXPECT_NEAR(norms[r][p], host_norms[r][p], 70 * 0x1p-24 * host_norms[r][p]);
    if (s.config.find("sign") == std::string::npos && s.config.find("onebit") == std::string::npos) EXPECT_EQ(host_norms[r], norms[r]);
  }
  for (const Outcome* run : {&host, &device})
    for (const Stats& stats : run->stats) EXPECT_EQ(stats.nonfinite_steps, nonfinite_steps);
}

TEST_F(ReducerDevice, IsTheHostToTheBit) {
  for (const char* config :
       {"dgc:density=0.01 min_numel=100", "dgc:density=0.002,wire=bf16,select=exact,nesterov=1 min_numel=100 start_step=1",
        "dgc:density=0.01,clip_norm=0.5 min_numel=100 exchange=gather", "codec=topk:density=0.1,wire=fp16 feedback=ef14 min_numel=100",
        "codec=topk:density=0.01,index=bitmap feedback=ef14:decay=0.5 min_numel=100 check_every=2", "codec=topk:density=0.03 min_numel=100",
        "codec=sign:scale=l2,block=24 feedback=ef14 exchange=gather min_numel=100", "codec=sign feedback=ef14:decay=0.5 min_numel=100",
        "onebit_adam:freeze=1,clip_norm=0.5,block=tensor min_numel=100",
        "codec=sign feedback=ef14 target=momentum:freeze=1 exchange=gather min_numel=100",
        "codec=topk:density=0.01 feedback=ef21 exchange=gather min_numel=100",
        "codec=topk:density=0.02,wire=bf16,select=exact feedback=econtrol:worker_ema=0.5 min_numel=100",
        "codec=topk:density=0.1,index=bitmap feedback=econtrol:init=compressed,eta=0.5 exchange=gather min_numel=100 start_step=1",
        "codec=sign:block=tensor feedback=econtrol exchange=gather min_numel=100",
        "codec=sign:scale=l2,block=24 feedback=ef21:worker_ema=0.25,init=zero min_numel=100",
        "codec=sign feedback=econtrol min_numel=100 start_step=2"}) {
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

// Every eta here is above the contraction, so every fourth step is looked at, and the watchdog halves it again and again: at the same steps
// of both, also where a checkpoint of one goes on on the other, and after a reset.
TEST_F(ReducerDevice, TheWatchdogCutsWhereTheHostsDoes) {
  for (const char* config : {"codec=topk:density=0.1,select=exact feedback=econtrol:eta=0.9 exchange=gather min_numel=100",
                             "codec=topk:density=0.05 feedback=econtrol:eta=0.7,worker_ema=0.5 exchange=gather min_numel=100",
                             "codec=sign:block=24 feedback=econtrol:eta=1.6 exchange=gather min_numel=100"}) {
    SCOPED_TRACE(config);
    Scenario s;
    s.world = 2;
    s.config = config;
    s.steps = 60;
    s.parameters = kModel;
    s.grad = numbers(real_number, 15, kModel);
    s.before_step = [](GradientReducer& reducer, int step, int) {
      if (step == 52) reducer.reset();
    };
    const auto run = [&](int device, int steps, const std::vector<ReducerState>& start, int begin) {
      Scenario part = s;
      part.device = device;
      part.steps = steps;
      part.start = start;
      part.grad = [grad = s.grad, begin](int step, int rank, std::uint32_t p) { return grad(begin + step, rank, p); };
      part.before_step = [before = s.before_step, begin](GradientReducer& reducer, int step, int rank) {
        before(reducer, begin + step, rank);
      };
      return play(part);
    };
    const Outcome host_half = run(-1, 48, {}, 0), device_half = run(0, 48, {}, 0);
    expect_same_looks(s.config, host_half, device_half);
    EXPECT_GT(host_half.stats[0].parameters[0].eta_cuts.value_or(0), 0u) << "nothing was shown";
    for (int r = 0; r < 2; ++r) EXPECT_EQ(host_half.state[std::size_t(r)].watchdog, device_half.state[std::size_t(r)].watchdog);
    const Outcome host = run(-1, 12, device_half.state, 48), device = run(0, 12, host_half.state, 48);
    expect_same_state(host.state, device.state);
    for (int r = 0; r < 2; ++r) EXPECT_EQ(host.state[std::size_t(r)].watchdog, device.state[std::size_t(r)].watchdog);
  }
}

// A dense step makes the mean of all estimates anew, whatever the verdict, and owners forget what they still owed it.
TEST_F(ReducerDevice, FlushesOfEstimatesAreTheHosts) {
  for (const char* config :
       {"codec=topk:density=0.05 feedback=econtrol exchange=gather min_numel=100", "codec=sign feedback=econtrol:init=zero min_numel=100",
        "codec=sign:block=24 feedback=ef21:worker_ema=0.5 min_numel=100"})
    for (const bool step_verdict : {false, true}) {
      SCOPED_TRACE(std::string(config) + (step_verdict ? " step verdict" : ""));
      Scenario s;
      s.world = 2;
      s.config = config;
      s.steps = 6;
      s.reducer.step_verdict = step_verdict;
      s.before_step = [](GradientReducer& reducer, int step, int) {
        if (step == 2 || step == 4) reducer.flush();
      };
      s.grad = [clean = numbers(real_number, 14, kModel)](int step, int rank, std::uint32_t p) {
        Vec g = clean(step, rank, p);
        if (step == 4 && rank == 0 && p == 0) g[3] = std::numeric_limits<float>::quiet_NaN();
        return g;
      };
      expect_same_with_accidents(s, 1);
    }
}

TEST_F(ReducerDevice, LossScalesNonfiniteStepsAndJoinedRanksAreTheHostsToo) {
  bool odd = false;
  const auto clean = numbers(real_number, 12, kModel);
  for (const char* config :
       {"dgc:density=0.01 min_numel=100", "dgc:density=0.02,clip_norm=0.5,select=exact min_numel=100",
        "codec=topk:density=0.1,wire=bf16 feedback=ef14 min_numel=100 start_step=3", "codec=topk:density=0.03 min_numel=100", "codec=none",
        "onebit_adam:freeze=1,block=64 min_numel=100", "codec=sign feedback=none min_numel=100",
        "codec=sign feedback=ef14 target=momentum:freeze=2 exchange=gather min_numel=100",
        "codec=topk:density=0.1,wire=fp16 feedback=econtrol exchange=gather min_numel=100 start_step=4",
        "codec=topk:density=0.02,select=exact feedback=ef21:init=dense,worker_ema=0.5 min_numel=100",
        "codec=topk:density=0.1 feedback=econtrol:init=compressed min_numel=100",
        "codec=sign:block=5000 feedback=econtrol:worker_ema=0.5,init=zero min_numel=100", "codec=sign feedback=ef21 min_numel=100",
        "codec=topk:density=0.1 feedback=econtrol:residual=bf16,estimate=grid min_numel=100 start_step=2",
        "codec=topk:density=0.02,select=exact feedback=ef14:residual=bf16 min_numel=100",
        "codec=topk:density=0.05,select=exact feedback=ef21:estimate=grid min_numel=100",
        "codec=sign:block=5000 feedback=econtrol:residual=bf16 min_numel=100",
        "codec=sign:block=tensor feedback=ef14:residual=bf16 target=momentum:freeze=2 min_numel=100"}) {
    for (const bool step_verdict : {false, true}) {
      const bool in_memory = step_verdict != odd;
      SCOPED_TRACE(std::string(config) + (step_verdict ? " step verdict" : "") + (in_memory ? " scale in memory" : ""));
      Scenario s;
      s.world = 2;
      s.config = config;
      s.steps = 7;
      s.dtype = step_verdict ? DType::fp32 : DType::bf16;
      s.reducer.step_verdict = step_verdict;
      s.options = [](int step, int rank) {
        constexpr float kScales[] = {1024, 1024, 512, 512, 1, 3, 0.37f};
        return ReduceOptions{.loss_scale = kScales[step], .joined = step == 4 && rank == 1};
      };
      s.grad = [clean](int step, int rank, std::uint32_t p) {
        Vec g = clean(step, rank, p);
        if ((step == 0 || step == 3) && rank == 1 && p == 2) g[7] = std::numeric_limits<float>::infinity();
        return g;
      };
      s.scale_in_memory = in_memory;
      expect_same_with_accidents(s, 2);
    }
    odd = !odd;
  }
}

// Its kernel takes whole 16-byte words, wherever the bucket begins and ends, and leaves alone what lies around it.
TEST_F(ReducerDevice, PlainBucketsMayBeginAnywhere) {
  for (const DType dtype : {DType::fp32, DType::bf16, DType::fp16})
    for (const std::size_t first : {0, 1, 3, 6})
      for (const std::size_t n : {1, 5, 21, 20011}) {
        SCOPED_TRACE(std::string(to_string(dtype)) + " from " + std::to_string(first) + ", " + std::to_string(n));
        run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
          GradBuffer host_grad(dtype, n), device_grad(dtype, first + n + 8);
          for (std::size_t i = 0; i < n; ++i) host_grad.set(i, real_number(16, 0, communicator->rank(), 0, i));
          const auto around = [&](std::size_t i) { return i < first || i >= first + n; };
          for (std::size_t i = 0; i < first + n + 8; ++i) device_grad.set(i, around(i) ? 77.0f : host_grad.get(i - first));
          GradientReducer host(communicator, Config::parse("codec=none"), {{"w", {n}}});
          host.reduce(Ids{0}, host_grad.view()).wait();
          GradientReducer device(communicator, Config::parse("codec=none"), {{"w", {n}}}, {.device = 0});
          const DeviceStream stream(0);
          Bytes there = device_grad.on_device(0, stream.get());
          there.data += first * size_of(dtype), there.size = n * size_of(dtype);
          device.reduce(Ids{0}, there, stream.get()).wait();
          device_grad.fetch(stream.get());
          for (std::size_t i = 0; i < first + n + 8; ++i) ASSERT_EQ(device_grad.get(i), around(i) ? 77.0f : host_grad.get(i - first)) << i;
        });
      }
}

// The finished part of a joined owner is no message of its own: its header has to say all the same that the sum overflowed.
TEST_F(ReducerDevice, AJoinedOwnerTellsOfASumThatOverflows) {
  for (const char* config : {"codec=topk:density=0.1 feedback=ef14 min_numel=100", "dgc:density=0.01,momentum=0 min_numel=100"}) {
    Scenario s;
    s.world = 3;
    s.config = config;
    s.steps = 2;
    s.options = [](int step, int rank) { return ReduceOptions{.joined = step == 0 && rank == 2}; };
    s.grad = [clean = numbers(real_number, 13, kModel)](int step, int rank, std::uint32_t p) {
      Vec g = clean(step, rank, p);
      if (step == 0 && p == 3) g.back() = 3e38f;  // the last rank owns it
      return g;
    };
    expect_same_with_accidents(s, 1);
  }
}

TEST_F(ReducerDevice, ALossScaleInMemoryThatIsNotAPositiveNumberIsABadStepAndThenAnError) {
  using Limits = std::numeric_limits<float>;
  for (const float wrong : {0.0f, -2.0f, Limits::infinity(), Limits::quiet_NaN()})
    for (const char* config : {"dgc:density=0.1 min_numel=100", "dgc:density=0.1 min_numel=100 start_step=9"}) {
      SCOPED_TRACE(std::string(config) + " " + std::to_string(wrong));
      run_ranks(2, [&](std::shared_ptr<Communicator> communicator) {
        const int rank = communicator->rank();
        GradientReducer reducer(communicator, Config::parse(config), {{"w", {30, 40}}, {"bias", {30}}}, {.device = 0});
        const DeviceStream stream(0);
        DeviceBuffer scale(sizeof(float), 0);
        const auto reduce = [&](float value) {
          device_copy(scale.data(), &value, sizeof value, stream.get());
          GradBuffer grad(DType::fp32, 1230);
          for (std::size_t i = 0; i < 1230; ++i) grad.set(i, float(i) - 600);
          const Bytes there = grad.on_device(0, stream.get());
          reducer.reduce(Ids{0, 1}, there, stream.get(), {.device_loss_scale = reinterpret_cast<const float*>(scale.data())}).wait();
          grad.fetch(stream.get());
          return grad;
        };
        const GradBuffer good = reduce(4.0f);
        EXPECT_TRUE(std::isfinite(good.get(0)));
        const GradBuffer bad = reduce(rank == 1 ? wrong : 4.0f);  // both ranks hear of it
        for (std::size_t i = 0; i < 1230; ++i) ASSERT_TRUE(std::isnan(bad.get(i))) << i;
        communicator->barrier();
        if (rank == 1) expect_error(Errc::invalid_argument, {"loss_scale=", "positive", "later call"}, [&] { reduce(4.0f); });
      });
    }
}

TEST_F(ReducerDevice, RefusesALossScaleInDeviceMemoryWhereNoKernelReadsIt) {
  run_ranks(1, [](std::shared_ptr<Communicator> communicator) {
    const DeviceStream stream(0);
    DeviceBuffer scale(sizeof(float), 0);
    const ReduceOptions options{.device_loss_scale = reinterpret_cast<const float*>(scale.data())};
    GradBuffer grad(DType::fp32, 4);
    GradientReducer host(communicator, Config::parse("dgc:density=0.1"), {{"w", {4}}});
    expect_error(Errc::invalid_argument, {"device_loss_scale", "host memory"},
                 [&] { host.reduce(Ids{0}, grad.view(), Stream::host(), options); });
    GradientReducer reducer(communicator, Config::parse("dgc:density=0.1"), {{"w", {4}}}, {.device = 0});
    ReduceOptions both = options;
    both.loss_scale = 2;
    expect_error(Errc::invalid_argument, {"loss_scale=2", "device_loss_scale"},
                 [&] { reducer.reduce(Ids{0}, grad.on_device(0, stream.get()), stream.get(), both); });
  });
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
