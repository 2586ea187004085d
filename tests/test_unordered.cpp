// The unordered pass that bench/ measures order against sends the same entries as the codec and leaves the same state: a shortcut that
// computed something else would make the comparison worthless.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "bench/unordered.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"
#include "compressors/topk/topk_cuda.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire {
namespace {

constexpr std::size_t kLarge = 150000, kSmall = 777, kAll = kLarge + kSmall;

/// A codec, its state and its payload in device memory: two segments, the second of which starts off a 16-byte line.
struct Side {
  explicit Side(std::unique_ptr<const Codec> of) : codec(std::move(of)), stream(0) {
    segments[0].count = kLarge - 3;
    segments[1].first = kLarge - 3;
    segments[1].count = kSmall;
    for (auto& segment : segments) segment.setting.density = 0.02;
    plan = {segments, {&part_end, 1}, 0};
    layout = codec->layout(plan);
    for (DeviceBuffer* buffer : {&residual, &grad}) buffer->reserve(4 * kAll, 0);
    wire.reserve(layout.part_capacity, 0);
    words.reserve(256, 0);
    workspace.reserve(layout.workspace, 0);
    for (DeviceBuffer* buffer : {&residual, &words}) device_clear(buffer->bytes(), stream.get());
    auto* const state = reinterpret_cast<float*>(residual.data());
    states[0].array = {state, nullptr};
    states[1].array = {state + kLarge, nullptr};
    for (int s = 0; s < 2; ++s) states[s].memory = reinterpret_cast<float*>(words.data()) + s;
    recursion.kind = Recursion::Kind::error_feedback;
    std::vector<std::byte> host(codec->table_bytes(plan));
    codec->tabulate(recursion, plan, states, host.data());
    table.reserve(host.size(), 0);
    device_copy(table.data(), host.data(), host.size(), stream.get());
    device_wait(stream.get());
    plan.table = {table.data(), host.size(), DType::u8, Place::cuda, 0};
  }
  void step(const std::vector<float>& gradient) {
    device_copy(grad.data(), gradient.data(), 4 * gradient.size(), stream.get());
    codec->stream(recursion, plan, {grad.data(), 4 * gradient.size(), DType::fp32, Place::cuda, 0}, {states, nullptr}, workspace.bytes(),
                  {wire.data(), layout.part_capacity, DType::u8, Place::cuda, 0}, reinterpret_cast<std::uint32_t*>(words.data() + 64),
                  {reinterpret_cast<std::uint32_t*>(words.data() + 128), nullptr}, stream.get());
    ++plan.step;
  }
  template <class T>
  std::vector<T> read(const std::byte* from, std::size_t count) {
    std::vector<T> host(count);
    device_copy(host.data(), from, sizeof(T) * count, stream.get());
    device_wait(stream.get());
    return host;
  }
  /// Index and bits of the value of each entry of a segment, in the payload's order.
  std::vector<std::pair<std::uint32_t, std::uint32_t>> entries(int s, const TopKOptions& options) {
    const auto payload = read<std::uint32_t>(wire.data(), layout.part_capacity / 4);
    const topk::SegmentWire shape[2] = {topk::segment_wire(segments[0], options), topk::segment_wire(segments[1], options)};
    const std::uint32_t kept = payload[sizeof(wire::Header) / 4 + std::size_t(s)];
    EXPECT_LT(kept, shape[s].capacity);  // else which ones were sent would be chance
    const std::uint32_t* const index = payload.data() + topk::entries_offset(2) / 4 + (s == 0 ? 0 : shape[0].bytes() / 4);
    const std::uint32_t* const value = index + shape[s].index_bytes / 4;
    const auto* const half = reinterpret_cast<const std::uint16_t*>(value);
    std::vector<std::pair<std::uint32_t, std::uint32_t>> out;
    for (std::uint32_t i = 0; i < kept; ++i) out.emplace_back(index[i], options.wire == DType::fp32 ? value[i] : half[i]);
    return out;
  }

  std::unique_ptr<const Codec> codec;
  DeviceStream stream;
  Segment segments[2];
  std::uint32_t part_end = 2;
  SegmentState states[2];
  Plan plan;
  WireLayout layout;
  Recursion recursion;
  DeviceBuffer residual, grad, wire, words, workspace, table;
};

TEST(Unordered, SendsTheSameEntriesAndLeavesTheSameState) {
  if (device_count() == 0) GTEST_SKIP() << "there is no GPU";
  TopKOptions options;
  options.index = TopKOptions::Index::u32;
  for (const DType wire : {DType::fp32, DType::bf16}) {
    options.wire = wire;
    Side ordered(make_topk_cuda(options)), unordered(bench::make_topk_unordered(options));
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> gradient(kLarge - 3 + kSmall);
    for (int step = 0; step < 4; ++step) {
      for (float& x : gradient) x = normal(random) * (step == 0 ? 1.0f : 0.25f);  // less than was sent comes in: no threshold lags behind
      ordered.step(gradient);
      unordered.step(gradient);
      for (int s = 0; s < 2; ++s) {
        auto ours = ordered.entries(s, options), theirs = unordered.entries(s, options);
        EXPECT_TRUE(std::is_sorted(ours.begin(), ours.end()));
        EXPECT_GT(ours.size(), ordered.segments[s].count / 200) << "a density far from the one that was asked for";
        if (s == 0) EXPECT_FALSE(std::is_sorted(theirs.begin(), theirs.end())) << "then order was paid for here too";
        std::sort(theirs.begin(), theirs.end());
        EXPECT_EQ(ours, theirs) << "step " << step << ", segment " << s;
      }
      EXPECT_EQ(ordered.read<std::uint32_t>(ordered.residual.data(), kAll), unordered.read<std::uint32_t>(unordered.residual.data(), kAll));
      EXPECT_EQ(ordered.read<std::uint32_t>(ordered.words.data(), 64), unordered.read<std::uint32_t>(unordered.words.data(), 64));
    }
  }
}

TEST(Unordered, RefusesWhatItDoesNotMeasure) {
  if (device_count() == 0) GTEST_SKIP() << "there is no GPU";
  Side side(bench::make_topk_unordered({}));
  side.recursion.kind = Recursion::Kind::none;
  for (auto& state : side.states) state.array = {};
  EXPECT_THROW(side.step(std::vector<float>(kLarge - 3 + kSmall)), Error);
}

}  // namespace
}  // namespace thinwire
