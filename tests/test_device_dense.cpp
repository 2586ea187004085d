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

std::vector<Recursion> recursions() {
  std::vector<Recursion> out = {no_feedback(), ef14(), ef14(0.75f)};
  for (int i = 0; i < 3; ++i) out.push_back(out[std::size_t(i)]), out.back().averaged = true;
  for (const bool nesterov : {false, true})
    out.push_back({.kind = Recursion::Kind::momentum_correction, .momentum = 0.9f, .nesterov = nesterov});
  return out;
}

// Segments with state and one whose parameter has none, with gradients and sums past the largest float among them.
void is_the_hosts(const Recursion& recursion, DType dtype) {
  const std::vector<std::size_t> counts = {1, 4097, 9000, 33};
  std::vector<Segment> segments;
  std::size_t numel = 1, packed = 0;
  for (const std::size_t n : counts) {
    Segment segment;
    segment.first = numel;
    segment.count = n;
    segments.push_back(segment);
    numel += n + 1;
    packed += n;
  }
  const auto grad = oracle::to_bytes(gradients(numel, 5, true), dtype);
  const std::vector<float> factors = {1.0f, 0.3f, 1.0f, 2.0f}, beta1 = {0.9f, 0.5f, 0.99f, 0.9f};
  std::vector<std::vector<float>> first, last;
  for (const std::size_t n : counts)
    first.push_back(gradients(n, unsigned(n), false)), last.push_back(gradients(n, unsigned(n + 1), false));
  for (std::size_t i = 0; i < 9000; i += 7) last[2][i] = 3.3e38f;

  const bool residual = recursion.kind != Recursion::Kind::none,
             two = recursion.averaged || recursion.kind == Recursion::Kind::momentum_correction;
  Device device;
  std::vector<SegmentState> states(counts.size());
  std::vector<DeviceDense> dense(counts.size());
  std::vector<std::uint32_t> chunk_segment;
  std::size_t at = 0;
  for (std::size_t s = 0; s < counts.size(); ++s) {
    dense[s].range = {segments[s].first, counts[s], std::uint32_t(chunk_segment.size())};
    dense[s].factor = std::uint32_t(s);
    dense[s].packed = at;
    at += counts[s];
    chunk_segment.insert(chunk_segment.end(), device_chunks(counts[s]), std::uint32_t(s));
    const bool stateless = s == 3 && recursion.kind != Recursion::Kind::momentum_correction;
    if (two && !stateless) states[s].array[0] = first[s].data(), dense[s].momentum = device.of(first[s]);
    if (residual && !stateless) states[s].array[two ? 1 : 0] = last[s].data(), dense[s].residual = device.of(last[s]);
  }
  const DeviceRanges ranges{reinterpret_cast<const std::byte*>(device.of(dense)), sizeof(DeviceDense), dense.size(), chunk_segment.size(),
                            device.of(chunk_segment)};
  float* const messages = device.of(std::vector<float>(packed, NAN));
  std::uint32_t* const flags = device.of(std::vector<std::uint32_t>{0});
  launch_dense_message(recursion, ranges, {device.of(grad), grad.size(), dtype, Place::cuda, 0}, device.of(factors), messages, flags,
                       device.stream.get(), device.of(beta1));

  std::vector<float> want(packed, NAN);
  std::uint32_t want_flags = 0;
  dense_message(recursion, {segments, {}, 0}, {grad.data(), grad.size(), dtype, Place::host, 0}, {states, factors.data(), beta1.data()},
                host_bytes(want.data(), want.size()), &want_flags, Stream::host());
  const auto where = [&] { return describe(recursion) + " grad " + to_string(dtype); };
  expect_same_bits(device.back(messages, packed), want, where);
  EXPECT_EQ(device.back(flags, 1)[0], want_flags);
  EXPECT_EQ(want_flags, unsigned(kFlagNonfinite));
  for (std::size_t s = 0; s < counts.size(); ++s) {
    if (dense[s].momentum != nullptr) expect_same_bits(device.back(dense[s].momentum, counts[s]), first[s], where);
    if (dense[s].residual != nullptr) expect_same_bits(device.back(dense[s].residual, counts[s]), last[s], where);
  }
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

}  // namespace
}  // namespace thinwire
