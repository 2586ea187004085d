// What a bucket costs the host on a GPU: kernels, waits and copies back, counted in the emulator; and the device memory that is refused.

#include <cuda_runtime.h>

#include <cstdlib>

#include "tests/reducer_world.hpp"

namespace thinwire::test {
namespace {

/// A world of one in device memory: what is sent has arrived. It launches nothing, so all that is counted is the reducer's own.
class Alone final : public Communicator {
 public:
  int rank() const noexcept override { return 0; }
  int size() const noexcept override { return 1; }
  const char* transport() const noexcept override { return "alone"; }
  std::unique_ptr<Communicator> split(int, int) override { return std::make_unique<Alone>(); }
  void abort(const std::string&) noexcept override {}

 private:
  bool serves(Place) const noexcept override { return true; }
  static void move(ConstBytes send, Bytes recv, Stream stream) {
    if (send.data != recv.data && send.place == Place::cuda) device_copy(recv.data, send.data, send.size, stream);
  }
  void do_all_gather(ConstBytes send, Bytes recv, Stream stream) override { move(send, recv, stream); }
  void do_all_to_all(ConstBytes send, std::span<const std::size_t>, Bytes recv, std::span<const std::size_t>, Stream stream) override {
    move(send, recv, stream);
  }
  void do_all_reduce(Bytes, Stream) override {}
  void do_broadcast(Bytes, int, Stream) override {}
  void do_barrier() override {}
};

struct Counted {
  std::size_t kernels, waits, copies;
};

/// Steps of one bucket with a matrix and a bias; what each of steps [first, last) cost.
std::vector<Counted> count(const std::string& config, const ReducerOptions& given, int first, int last) {
  ReducerOptions options = given;
  options.device = 0;
  GradientReducer reducer(std::make_shared<Alone>(), Config::parse(config), {{"w", {100, 300}}, {"bias", {100}}}, options);
  DeviceStream stream(0);
  DeviceBuffer grad(4 * 30100, 0);
  const Ids ids = {0, 1};
  std::vector<Counted> out;
  for (int step = 0; step < last; ++step) {
    device_clear(grad.bytes(), stream.get());
    const Counted before{emulator::launches(), emulator::waits(), emulator::copies_to_host()};
    reducer.reduce(ids, {grad.data(), 4 * 30100, DType::fp32, Place::cuda, 0}, stream.get());
    if (step >= first)
      out.push_back({emulator::launches() - before.kernels, emulator::waits() - before.waits, emulator::copies_to_host() - before.copies});
  }
  return out;
}

// begin; messages and their sum for what stays dense (of two groups one is empty, and launches nothing); the pass; decode; verdict; settle,
// take back; end of step. Clipping adds norms and factors of both groups; every 16th step adds norms where nothing clips.
TEST(ReducerLaunches, AreThoseOfTheDocumentation) {
  struct Case {
    std::string config;
    std::size_t kernels, more_at_16;
  };
  const std::size_t around = 1 + 1 + 1 + 2 + 1 + 1 + 1 + 1;  // all but the pass
  for (const Case& c :
       {Case{"codec=topk:density=0.01 feedback=dgc exchange=gather min_numel=1000", around + 3, 4},
        Case{"codec=topk:density=0.01,select=exact feedback=dgc exchange=gather min_numel=1000", around + 7, 4},
        Case{"codec=topk:density=0.01 feedback=dgc:clip_norm=1 exchange=gather min_numel=1000", around + 3 + 6, 0},
        // The bias has no state to be emptied; EF21 takes nothing back.
        Case{"codec=topk:density=0.01 feedback=econtrol:init=zero exchange=gather min_numel=1000", around - 1 + 3, 4},
        Case{"codec=topk:density=0.01,select=exact feedback=econtrol:init=zero exchange=gather min_numel=1000", around - 1 + 8, 4},
        Case{"codec=topk:density=0.01,select=exact feedback=ef21:init=zero exchange=gather min_numel=1000", around - 2 + 7, 4}}) {
    for (const auto& [kernels, waits, copies] : count(c.config, {}, 1, 16)) {
      EXPECT_EQ(kernels, c.kernels) << c.config;
      EXPECT_EQ(waits, 0u) << c.config;
      EXPECT_EQ(copies, 0u) << c.config;
    }
    EXPECT_EQ(count(c.config, {}, 16, 17)[0].kernels, c.kernels + c.more_at_16) << c.config;
  }
}

TEST(ReducerLaunches, NoStepWaitsOrCopiesBack) {
  for (const bool verdict : {false, true}) {
    ReducerOptions options;
    options.step_verdict = verdict;
    for (const char* config :
         {"codec=none", "codec=topk:density=0.02 feedback=ef14 exchange=gather", "codec=sign feedback=ef14 exchange=gather",
          "codec=topk:density=0.02 feedback=dgc start_step=1000", "codec=topk:density=0.02 feedback=econtrol:init=zero exchange=gather",
          "codec=sign feedback=econtrol:init=zero start_step=1000", "codec=topk:density=0.02 feedback=ef21 start_step=1000"}) {
      for (const auto& [kernels, waits, copies] : count(config, options, 1, 40)) {
        EXPECT_GT(kernels, 0u);
        EXPECT_EQ(waits, 0u) << config;
        EXPECT_EQ(copies, 0u) << config;
      }
    }
    options = {};
    const auto checked = count("codec=topk:density=0.02 feedback=ef14 exchange=gather check_every=1", options, 1, 2);
    EXPECT_GT(checked[0].waits, 0u);  // what asks for the mean is seen
    EXPECT_GT(checked[0].copies, 0u);
  }
}

TEST(ReducerLaunches, MemoryThatIsNotThereIsSaidBeforeTheFirstStep) {
  setenv("THINWIRE_EMULATED_FREE", "300000", 1);
  const auto make = [](std::size_t largest) {
    ReducerOptions options;
    options.device = 0;
    options.largest_bucket = largest;
    GradientReducer reducer(std::make_shared<Alone>(), Config::parse("dgc:density=0.5"), {{"w", {1000, 300}}, {"v", {100, 300}}}, options);
  };
  const std::string said = expect_error(Errc::device, {"GPU 0", "330000 elements", "300000 are free"}, [&] { make(0); });
  EXPECT_NE(said.find("bytes beside the state"), std::string::npos);
  make(30000);  // smaller buckets fit
  set_memory_reclaim([] { unsetenv("THINWIRE_EMULATED_FREE"); });
  make(0);  // nor where somebody gives back what he kept
  set_memory_reclaim(nullptr);
}

TEST(ReducerLaunches, AnAllocationThatFindsNoRoomIsTriedAgainOnceOthersGaveBackTheirs) {
  setenv("THINWIRE_EMULATED_LARGEST", "1000", 1);
  EXPECT_EQ(DeviceBuffer(1000, 0).size(), 1000u);
  expect_error(Errc::device, {"2000 bytes", "GPU 0"}, [] { DeviceBuffer(2000, 0); });
  set_memory_reclaim([] { setenv("THINWIRE_EMULATED_LARGEST", "1500", 1); });
  expect_error(Errc::device, {"2000 bytes", "GPU 0"}, [] { DeviceBuffer(2000, 0); });  // not enough
  set_memory_reclaim([] { unsetenv("THINWIRE_EMULATED_LARGEST"); });
  EXPECT_EQ(DeviceBuffer(2000, 0).size(), 2000u);
  set_memory_reclaim(nullptr);
}

TEST(ReducerLaunches, PointersOfAnotherPlaceAreRefused) {
  ReducerOptions options;
  options.device = 0;
  GradientReducer reducer(std::make_shared<Alone>(), Config::parse("dgc:density=0.01"), {{"w", {100, 300}}}, options);
  DeviceStream stream(0);
  DeviceBuffer grad(4 * 30000, 0);
  Vec host(30000);
  const Ids ids = {0};
  const Bytes lying{reinterpret_cast<std::byte*>(host.data()), 4 * 30000, DType::fp32, Place::cuda, 0};
  expect_error(Errc::invalid_argument, {"the bucket lies in host memory", "GPU 0"}, [&] { reducer.reduce(ids, lying, stream.get()); });
  ReduceOptions scaled;
  const float scale = 2;
  scaled.device_loss_scale = &scale;
  const Bytes right{grad.data(), 4 * 30000, DType::fp32, Place::cuda, 0};
  expect_error(Errc::invalid_argument, {"the loss scale lies in host memory"}, [&] { reducer.reduce(ids, right, stream.get(), scaled); });
  reducer.reduce(ids, right, stream.get());
}

}  // namespace
}  // namespace thinwire::test
