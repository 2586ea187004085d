// The dense step of every recursion on a GPU: messages, state and flags of the host's, to the bit.

#include <array>
#include <cstring>
#include <vector>

#include "compressors/core/device.hpp"
#include "compressors/core/device_recursion.hpp"
#include "tests/codec_backends.hpp"
#include "tests/dtype_oracle.hpp"

namespace thinwire {
namespace {

/// Host arrays with a twin on the device.
struct Device {
  DeviceStream stream{0};
  std::vector<DeviceBuffer> buffers;

  template <class T>
  T* of(const std::vector<T>& host) {
    DeviceBuffer& buffer = buffers.emplace_back(host.size() * sizeof(T) + 1, 0);
    device_copy(buffer.data(), host.data(), host.size() * sizeof(T), stream.get());
    return reinterpret_cast<T*>(buffer.data());
  }
  template <class T>
  std::vector<T> back(const T* device, std::size_t count) {
    std::vector<T> host(count);
    device_copy(host.data(), device, count * sizeof(T), stream.get());
    device_wait(stream.get());
    return host;
  }
};

/// Segments with state and one whose parameter has none (but DGC's), on the host and on the device.
struct Rig {
  Recursion recursion;
  std::vector<Segment> segments;
  std::size_t numel = 1, packed = 0;
  std::vector<std::vector<std::vector<float>>> arrays;  ///< per segment
  std::vector<SegmentState> states;
  Device device;
  std::vector<std::vector<float*>> there;  ///< the twins of `arrays`
  DeviceRanges ranges;

  explicit Rig(const Recursion& r) : recursion(r) {
    std::vector<DeviceDense> dense;
    std::vector<std::uint32_t> chunk_segment;
    for (const std::size_t n : {1, 4097, 9000, 33}) {
      Segment segment;
      segment.first = numel;
      segment.count = n;
      const bool stateless = segments.size() == 3 && recursion.kind != Recursion::Kind::momentum_correction;
      SegmentState &state = states.emplace_back(), twin;
      auto& own = arrays.emplace_back();
      auto& twins = there.emplace_back();
      for (std::size_t j = 0; j < (stateless ? 0 : state_names(recursion).size()); ++j) {
        own.push_back(held_values(n, unsigned(n + j), false));
        for (std::size_t i = 0; i < n && segments.size() == 2; i += 7) own[j][i] = 3.3e38f;
      }
      for (std::size_t j = 0; j < own.size(); ++j) {
        twins.push_back(device.of(own[j]));
        state.array[j] = own[j].data(), twin.array[j] = twins[j];
      }
      DeviceDense& out = dense.emplace_back();
      out.range = {segment.first, n, std::uint32_t(chunk_segment.size())};
      out.factor = std::uint32_t(segments.size());
      out.packed = packed;
      out.set(recursion, twin);
      chunk_segment.insert(chunk_segment.end(), device_chunks(n), std::uint32_t(segments.size()));
      segments.push_back(segment);
      numel += n + 1;
      packed += n;
    }
    ranges = {reinterpret_cast<const std::byte*>(device.of(dense)), sizeof(DeviceDense), dense.size(), chunk_segment.size(),
              device.of(chunk_segment)};
  }
  Plan plan() const { return {segments, {}, 0}; }
  void expect_same_state(const std::string& where) {
    for (std::size_t s = 0; s < segments.size(); ++s)
      for (std::size_t j = 0; j < arrays[s].size(); ++j)
        expect_same_bits(device.back(there[s][j], segments[s].count), arrays[s][j],
                         [&] { return where + " segment " + std::to_string(s) + " array " + std::to_string(j); });
  }
};

std::vector<Recursion> recursions() {
  std::vector<Recursion> out = {no_feedback(), ef14(), ef14(0.75f)};
  for (int i = 0; i < 3; ++i) out.push_back(out[std::size_t(i)]), out.back().averaged = true;
  for (const bool nesterov : {false, true})
    out.push_back({.kind = Recursion::Kind::momentum_correction, .momentum = 0.9f, .nesterov = nesterov});
  for (Recursion estimate : {ef21(), ef21(0.25f), econtrol(), econtrol(0.1f)}) {
    out.push_back(estimate);
    estimate.starting = true;
    out.push_back(estimate);
  }
  return out;
}

// Gradients and sums past the largest float are among them.
void is_the_hosts(const Recursion& recursion, DType dtype) {
  Rig rig(recursion);
  const auto grad = oracle::to_bytes(gradients(rig.numel, 5, true), dtype);
  const std::vector<float> factors = {1.0f, 0.3f, 1.0f, 2.0f}, beta1 = {0.9f, 0.5f, 0.99f, 0.9f};
  Device& device = rig.device;
  float* const messages = device.of(std::vector<float>(rig.packed, NAN));
  std::uint32_t* const flags = device.of(std::vector<std::uint32_t>{0});
  launch_dense_message(recursion, rig.ranges, {device.of(grad), grad.size(), dtype, Place::cuda, 0}, device.of(factors), messages, flags,
                       device.stream.get(), device.of(beta1));

  std::vector<float> want(rig.packed, NAN);
  std::uint32_t want_flags = 0;
  dense_message(recursion, rig.plan(), {grad.data(), grad.size(), dtype, Place::host, 0}, {rig.states, factors.data(), beta1.data()},
                host_bytes(want.data(), want.size()), &want_flags, Stream::host());
  const std::string where = describe(recursion) + (recursion.starting ? " starting" : "") + " grad " + to_string(dtype);
  expect_same_bits(device.back(messages, rig.packed), want, [&] { return where; });
  EXPECT_EQ(device.back(flags, 1)[0], want_flags);
  EXPECT_EQ(want_flags, unsigned(kFlagNonfinite));
  rig.expect_same_state(where);
}

TEST(DeviceDense, MessagesAndStateAreTheHosts) {
  if (device_count() == 0) GTEST_SKIP() << "there is no GPU";
  for (const auto& recursion : recursions()) {
    for (const DType dtype : kTypes) {
      is_the_hosts(recursion, dtype);
      if (HasFatalFailure()) return;
    }
  }
}

// A start by each verdict, news that are kept, and a mean of estimates made anew, past the largest float too.
TEST(DeviceDense, EstimatesAreTheHosts) {
  if (device_count() == 0) GTEST_SKIP() << "there is no GPU";
  for (Recursion recursion : {ef21(), ef21(0.25f), econtrol(), econtrol(0.1f)}) {
    recursion.starting = true;
    for (const std::uint32_t verdict : {0u, unsigned(kFlagJoined), unsigned(kFlagNonfinite)}) {
      Rig rig(recursion);
      Device& device = rig.device;
      const Stream stream = device.stream.get();
      const bool finite = verdict != kFlagNonfinite;
      const std::uint32_t* const word = device.of(std::vector<std::uint32_t>{verdict});
      std::vector<float> sums = gradients(rig.packed, 7, false), means(sums), packed;
      sums[5000] = 3e38f;
      for (std::size_t i = 0; i < sums.size(); ++i) means[i] = sums[i] * 0.3f;
      float* const there = device.of(sums);
      launch_start_estimates(rig.ranges, there, 0.3f, word, stream);
      launch_keep_news(recursion, rig.ranges, word, stream);
      start_estimates(recursion, rig.plan(), {rig.states}, means.data(), finite);
      if (!finite) keep_news(recursion, rig.plan(), {rig.states});
      const std::string where = describe(recursion) + " verdict " + std::to_string(verdict);
      rig.expect_same_state(where);

      launch_pack_estimates(rig.ranges, there, stream);
      for (std::size_t s = 0; s < rig.segments.size(); ++s) {
        const StateArray estimate = estimate_of(recursion, rig.states[s]);
        for (std::size_t i = 0; i < rig.segments[s].count; ++i) packed.push_back(estimate ? estimate[i] : 0.0f);
      }
      expect_same_bits(device.back(there, rig.packed), packed, [&] { return where; });
      launch_set_mean_estimates(rig.ranges, there, 1.5f, stream);
      std::size_t at = 0;
      for (std::size_t s = 0; s < rig.segments.size(); at += rig.segments[s++].count) {
        float* const mean_estimate = mean_estimate_of(recursion, rig.states[s]);
        if (mean_estimate == nullptr) continue;
        std::fill_n(mean_estimate, rig.segments[s].count, 0.0f);
        add_to_mean_estimate(&packed[at], 1.5f, mean_estimate, rig.segments[s].count);
      }
      rig.expect_same_state(where);
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace thinwire
