// The contract over NCCL, with one rank: every span of the suite goes through device memory. What several ranks do, and how they lose each
// other, is tested where they are processes (tests/python/test_gpu.py, test_lost_peer.py).

#include <cuda_runtime_api.h>

#include <functional>
#include <utility>

#include "collectives/nccl/nccl.hpp"
#include "compressors/core/device.hpp"
#include "tests/communicator_contract.hpp"

namespace thinwire::test {
namespace {

/// Takes the host's spans and hands copies of them in device memory on.
class OnDevice final : public Communicator {
 public:
  explicit OnDevice(std::unique_ptr<Communicator> group) : group_(std::move(group)), stream_(0) { set_timeout(group_->timeout()); }

  int rank() const noexcept override { return group_->rank(); }
  int size() const noexcept override { return group_->size(); }
  const char* transport() const noexcept override { return group_->transport(); }
  std::unique_ptr<Communicator> split(int colour, int key) override { return std::make_unique<OnDevice>(group_->split(colour, key)); }
  void abort(const std::string& reason) noexcept override { group_->abort(reason); }

 private:
  Stream on() const { return stream_.get(); }
  template <class Byte>
  Bytes copy_of(BasicBytes<Byte> host, DeviceBuffer& buffer) {
    buffer.reserve(host.size + 1, 0);
    device_copy(buffer.data(), host.data, host.size, on());
    return {buffer.data(), host.size, host.dtype, Place::cuda, 0};
  }
  void back(Bytes to, Bytes from) {
    device_copy(to.data, from.data, to.size, on());
    device_wait(on());
  }

  void do_all_gather(ConstBytes send, Bytes recv, Stream) override {
    const Bytes all = copy_of(recv, out_);
    const bool in_place = !send.empty() && send.data >= recv.data && send.data < recv.data + recv.size;
    group_->all_gather(in_place ? all.sub(std::size_t(send.data - recv.data), send.size) : copy_of(send, in_), all, on());
    back(recv, all);
  }
  void do_all_to_all(ConstBytes send, std::span<const std::size_t> send_bytes, Bytes recv, std::span<const std::size_t> recv_bytes,
                     Stream) override {
    const Bytes all = copy_of(recv, out_);
    group_->all_to_all_v(copy_of(send, in_), send_bytes, all, recv_bytes, on());
    back(recv, all);
  }
  void do_equal_all_to_all(ConstBytes send, Bytes recv, std::span<const std::size_t>, Stream) override {
    const Bytes all = copy_of(recv, out_);
    group_->all_to_all(copy_of(send, in_), all, on());
    back(recv, all);
  }
  void do_all_reduce(Bytes data, Stream) override {
    const Bytes copy = copy_of(data, out_);
    group_->all_reduce(copy, on());
    back(data, copy);
  }
  void do_broadcast(Bytes data, int root, Stream) override {
    const Bytes copy = copy_of(data, out_);
    group_->broadcast(copy, root, on());
    back(data, copy);
  }
  void do_barrier() override { group_->barrier(); }

  const std::unique_ptr<Communicator> group_;
  DeviceStream stream_;
  DeviceBuffer in_, out_;
};

/// Whether NCCL can be used here; if not, the test is skipped.
bool usable() {
  std::string why;
  if (device_count() == 0) {
    why = "there is no GPU, or this build has no CUDA";
  } else {
    try {
      (void)nccl_unique_id();
    } catch (const Error& error) {
      if (error.code() != Errc::unsupported) throw;
      why = std::string("there is no libnccl that can be used: ") + error.what();
    }
  }
  if (!why.empty()) [&why] { GTEST_SKIP() << why; }();
  return why.empty();
}

std::unique_ptr<Communicator> group_of_one() { return make_nccl(nccl_unique_id(), 1, 0, 0, std::chrono::seconds(60)); }

struct Nccl {
  static std::vector<int> worlds() { return usable() ? std::vector<int>{1} : std::vector<int>{}; }
  static void run(int, const std::function<void(Communicator&)>& body) {
    OnDevice group(group_of_one());
    body(group);
  }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Nccl, CommunicatorContract, Nccl);

TEST(NcclGroup, RefusesWhatIsNoGroup) {
  expect_error(Errc::invalid_argument, "null", [] { make_nccl(nullptr, 0); });
  expect_error(Errc::invalid_argument, "rank 1 is outside", [] { make_nccl(ncclUniqueId{}, 1, 1, 0); });
}

TEST(NcclGroup, TakesHostSpansThroughACopy) {
  if (!usable()) return;
  const auto group = group_of_one();
  std::vector<float> mine = {1, -0.0f, 3}, all(3, 7.0f);
  group->all_gather(host_bytes(mine.data(), 3), host_bytes(all.data(), 3));
  EXPECT_EQ(all, mine);
  group->all_reduce(host_bytes(mine.data(), 3));
  EXPECT_EQ(all, mine);
  group->barrier();
}

TEST(NcclGroup, SpansOfTheDeviceNeedItsStream) {
  if (!usable()) return;
  const auto group = group_of_one();
  const DeviceBuffer buffer(64, 0);
  expect_error(Errc::invalid_argument, "needs a stream of that device", [&] { group->all_reduce(buffer.bytes(DType::fp32)); });
  const DeviceStream stream(0);
  group->all_reduce(buffer.bytes(DType::fp32), stream.get());
  device_wait(stream.get());
}

TEST(NcclGroup, ACapturedCallRunsWithItsGraph) {
  if (!usable()) return;
  const auto group = group_of_one();
  const DeviceStream stream(0);
  const DeviceBuffer from(256, 0), to(256, 0);
  std::vector<std::uint8_t> sent = stamped(0, 0, 256), got(256);
  group->all_gather(from.bytes(), to.bytes(), stream.get());  // what NCCL does at its first call is over before the capture
  device_clear(to.bytes(), stream.get());
  device_copy(from.data(), sent.data(), sent.size(), stream.get());
  device_wait(stream.get());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream.get().get(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
  group->all_gather(from.bytes(), to.bytes(), stream.get());
  ASSERT_EQ(cudaStreamEndCapture(stream.get().get(), &graph), cudaSuccess);
  device_copy(got.data(), to.data(), got.size(), stream.get());
  device_wait(stream.get());
  EXPECT_EQ(got, std::vector<std::uint8_t>(256)) << "it ran while it was captured";
  ASSERT_EQ(cudaGraphInstantiate(&ready, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(ready, stream.get().get()), cudaSuccess);
  device_copy(got.data(), to.data(), got.size(), stream.get());
  device_wait(stream.get());
  EXPECT_EQ(got, sent);
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
}

TEST(NcclGroup, AfterAbortEveryCallThrows) {
  if (!usable()) return;
  const auto group = group_of_one();
  group->abort("enough");
  float x = 1;
  for (int i = 0; i < 2; ++i) expect_error(Errc::peer_lost, "rank 0 aborted: enough", [&] { group->all_reduce(host_bytes(&x, 1)); });
  expect_error(Errc::peer_lost, "enough", [&] { group->barrier(); });
  expect_error(Errc::peer_lost, "enough", [&] { (void)group->split(0, 0); });
}

}  // namespace
}  // namespace thinwire::test
