// A step of the codec captured in a CUDA graph: no call of it waits for the device or copies to the host, and replays do what calls do.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "compressors/core/device.hpp"
#include "compressors/sign/sign_cuda.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire {
namespace {

struct Step {
  explicit Step(std::unique_ptr<const Codec> made) : codec(std::move(made)), stream(0) {
    segments[0].count = 100000;
    segments[1].first = 100000;
    segments[1].count = 777;
    for (auto& segment : segments) segment.setting.density = 0.02;
    plan = {segments, {&part_end, 1}, 0};
    layout = codec->layout(plan);
    residual.reserve(4 * 101000, 0);
    grad.reserve(4 * 101000, 0);
    out.reserve(4 * 101000, 0);
    wire.reserve(layout.part_capacity, 0);
    words.reserve(256, 0);
    workspace.reserve(std::max(layout.workspace, layout.per_payload), 0);
    for (DeviceBuffer* buffer : {&residual, &out, &words}) device_clear(buffer->bytes(), stream.get());
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> host(100777);
    for (float& x : host) x = normal(random);
    device_copy(grad.data(), host.data(), 4 * host.size(), stream.get());
    float* const state = reinterpret_cast<float*>(residual.data());
    states[0].array = {state, nullptr};
    states[1].array = {state + 100000, nullptr};
    for (int s = 0; s < 2; ++s) states[s].memory = reinterpret_cast<float*>(words.data()) + s;
    recursion.kind = Recursion::Kind::error_feedback;
    std::vector<std::byte> host_table(codec->table_bytes(plan));
    codec->tabulate(recursion, plan, states, host_table.data());
    table.reserve(host_table.size(), 0);
    device_copy(table.data(), host_table.data(), host_table.size(), stream.get());
    device_wait(stream.get());
    plan.table = {table.data(), host_table.size(), DType::u8, Place::cuda, 0};
    plan.factor = reinterpret_cast<const float*>(words.data() + 128);
  }
  /// What a loss scale makes of the mean; it changes between steps.
  void set_factor(int step) {
    const float factor = 0.5f + float(step);
    device_copy(words.data() + 128, &factor, sizeof factor, stream.get());
  }
  void enqueue() {
    auto* const flags = reinterpret_cast<std::uint32_t*>(words.data() + 64);
    const Bytes payload = {wire.data(), layout.part_capacity, DType::u8, Place::cuda, 0};
    const ConstBytes wires[1] = {payload};
    codec->stream(recursion, plan, {grad.data(), 4 * 100777, DType::fp32, Place::cuda, 0}, {states, nullptr}, workspace.bytes(), payload,
                  flags, {}, stream.get());
    codec->decode(plan, wires, 1.0f, workspace.bytes(), {out.data(), 4 * 100777, DType::fp32, Place::cuda, 0}, flags, stream.get());
    codec->take_back(recursion, plan, payload, {states, nullptr}, flags, stream.get());
  }
  std::vector<float> read(const DeviceBuffer& from) {
    std::vector<float> host(100777);
    device_copy(host.data(), from.data(), 4 * host.size(), stream.get());
    device_wait(stream.get());
    return host;
  }

  std::unique_ptr<const Codec> codec;
  DeviceStream stream;
  Segment segments[2];
  std::uint32_t part_end = 2;
  SegmentState states[2];
  Plan plan;
  WireLayout layout;
  Recursion recursion;
  DeviceBuffer residual, grad, out, wire, words, workspace, table;
};

/// A codec and the kernels of its pass.
struct Case {
  std::function<std::unique_ptr<const Codec>()> make;
  std::size_t kernels;
};

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const bool exact : {false, true}) {
    TopKOptions options;
    options.exact = exact;
    out.push_back({[options] { return make_topk_cuda(options); }, exact ? 7u : 3u});
  }
  for (const std::size_t block : {1024, 8192}) {
    SignOptions options;
    options.block = block;
    out.push_back({[options] { return make_sign_cuda(options); }, block > 4096 ? 4u : 2u});
  }
  return out;
}

TEST(CudaGraph, ReplaysDoWhatCallsDo) {
  if (device_count() == 0) GTEST_SKIP() << "there is no GPU";
  for (const Case& codec : cases()) {
    Step called(codec.make()), captured(codec.make());
    for (int step = 0; step < 4; ++step) {
      called.set_factor(step);
      called.enqueue();
    }

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(captured.stream.get().get(), cudaStreamCaptureModeGlobal), cudaSuccess);
    captured.enqueue();
    ASSERT_EQ(cudaStreamEndCapture(captured.stream.get().get(), &graph), cudaSuccess);
    std::size_t nodes = 0;
    ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
    EXPECT_EQ(nodes, codec.kernels + 2 + 1) << "kernels of a pass, a decode and a take-back, and nothing else";
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
    for (int step = 0; step < 4; ++step) {
      captured.set_factor(step);
      ASSERT_EQ(cudaGraphLaunch(executable, captured.stream.get().get()), cudaSuccess);
    }
    EXPECT_EQ(captured.read(captured.out), called.read(called.out));
    EXPECT_EQ(captured.read(captured.residual), called.read(called.residual));
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  }
}

}  // namespace
}  // namespace thinwire
