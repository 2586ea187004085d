#include "collectives/passengers.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/rounding.hpp"

namespace thinwire {
namespace {

constexpr std::size_t kTile = 2048;  // floats: the accumulator stays in L1 while one rank after the other is added

template <class T, class Convert>
inline __attribute__((always_inline)) void add_all(const T* x, Convert convert, float* sum, std::size_t n) {
  for_prefetched(
      n, [=](std::size_t i) __attribute__((always_inline)) { prefetch_ahead<kAskEvery * sizeof(T)>(x + i); },
      [=](std::size_t i) __attribute__((always_inline)) { sum[i] += convert(x[i]); });
}

THINWIRE_CLONES void add_fp32(const float* x, float* sum, std::size_t n) {
  add_all(
      x, [](float v) { return v; }, sum, n);
}
THINWIRE_CLONES void add_bf16(const std::uint16_t* x, float* sum, std::size_t n) {
  add_all(
      x, [](std::uint16_t v) { return bf16_to_float(v); }, sum, n);
}
THINWIRE_CLONES void add_fp16(const std::uint16_t* x, float* sum, std::size_t n) {
  add_all(
      x, [](std::uint16_t v) { return fp16_to_float(v); }, sum, n);
}
void add(ConstBytes x, std::size_t first, float* sum, std::size_t n) {
  if (x.dtype == DType::fp32) add_fp32(x.as<float>() + first, sum, n);
  if (x.dtype == DType::bf16) add_bf16(x.as<std::uint16_t>() + first, sum, n);
  if (x.dtype == DType::fp16) add_fp16(x.as<std::uint16_t>() + first, sum, n);
}

ConstBytes typed(ConstBytes bytes, std::size_t offset, std::size_t count, DType dtype) {
  return {bytes.data + offset, count * size_of(dtype), dtype, bytes.place, bytes.device};
}
Bytes typed(Bytes bytes, std::size_t offset, std::size_t count, DType dtype) {
  return {bytes.data + offset, count * size_of(dtype), dtype, bytes.place, bytes.device};
}

/// out = factor × Σ_r element range of each rank's bytes at `offset(r)`.
template <class Offset>
void sum_at(std::size_t world, Offset&& message, std::size_t n, float factor, Bytes out, std::uint32_t* flags) {
  std::array<float, kTile> sum;
  for (std::size_t first = 0; first < n; first += kTile) {
    const std::size_t count = std::min(kTile, n - first);
    std::fill_n(sum.begin(), count, 0.0f);
    for (std::size_t r = 0; r < world; ++r) add(message(r), first, sum.data(), count);
    if (!store_scaled(sum.data(), factor, out.dtype, out.data + first * size_of(out.dtype), count)) *flags |= kFlagNonfinite;
  }
}

}  // namespace

void sum_in_rank_order(std::span<const ConstBytes> messages, float factor, Bytes out, std::uint32_t* flags) {
  sum_at(
      messages.size(), [&](std::size_t r) { return messages[r]; }, out.count(), factor, out, flags);
}

void sum_in_rank_order(std::span<const ConstBytes> messages, std::size_t first, float factor, std::span<float> out) {
  std::uint32_t ignored = 0;  // the output's own sum has told
  sum_at(
      messages.size(), [&](std::size_t r) { return typed(messages[r], first * sizeof(float), out.size(), DType::fp32); }, out.size(),
      factor, host_bytes(out.data(), out.size()), &ignored);
}

void clear_padding(const BucketPlan& bucket, Bytes send) {
  for (std::size_t r = 0; r < bucket.shares.size(); ++r) {
    const std::size_t used = bucket.shares[r].parts[0].bytes() + bucket.shares[r].parts[1].bytes();
    const std::size_t room = bucket.two_phase ? bucket.phases.slot - bucket.layout.part_capacity : bucket.send_bytes[r];
    std::memset(send.data + bucket.share_first[r] + used, 0, room - used);
  }
}

void add_server_residuals(const Passengers& group, int world, Bytes message) {
  float* at = message.as<float>();
  for (std::size_t s = 0; s < group.segments.size(); at += group.segments[s++].count) {
    const Passengers::Owned& owned = group.owned[s];
    if (owned.residual == nullptr) continue;
    for (std::size_t i = 0; i < owned.count; ++i) at[owned.first + i] += float(world) * owned.residual[i];
  }
}

void clear_server_residuals(const Passengers& group) {
  for (const Passengers::Owned& owned : group.owned)
    if (owned.residual != nullptr) std::memset(owned.residual, 0, owned.count * sizeof(float));
}

std::size_t finish_owned(const BucketPlan& bucket, int world, int rank, ConstBytes received, std::size_t stride, const float factors[2],
                         Bytes finished, std::uint32_t* flags) {
  std::size_t in = 0, out = 0;
  for (int g = 0; g < 2; ++g) {
    const Passengers& own = bucket.shares[std::size_t(rank)].parts[g];
    sum_at(
        std::size_t(world), [&](std::size_t r) { return typed(received, r * stride + in, own.count, own.dtype); }, own.count, factors[g],
        typed(finished, out, own.count, bucket.dtype), flags);
    in += own.bytes();
    out += own.count * size_of(bucket.dtype);
  }
  return out;
}

void place_owned(const BucketPlan& bucket, int rank, ConstBytes finished, Bytes grad) {
  const std::size_t size = size_of(bucket.dtype);
  const std::byte* in = finished.data;
  for (const Passengers& own : bucket.shares[std::size_t(rank)].parts) {
    for (const Segment& part : own.segments) {
      if (part.count != 0) std::memcpy(grad.data + part.first * size, in, part.count * size);
      in += part.count * size;
    }
  }
}

void place_raw(const BucketPlan& bucket, std::span<const ConstBytes> messages, const float factors[2], Bytes grad, std::uint32_t* flags) {
  std::size_t offset = 0;
  for (int g = 0; g < 2; ++g) {
    const Passengers& group = bucket.passengers[g];
    for (const Segment& segment : group.segments) {
      sum_at(
          messages.size(), [&](std::size_t r) { return typed(messages[r], offset, segment.count, group.dtype); }, segment.count, factors[g],
          typed(grad, segment.first * size_of(grad.dtype), segment.count, grad.dtype), flags);
      offset += segment.count * size_of(group.dtype);
    }
  }
}

void fill_nan(Bytes grad) {
  if (grad.dtype == DType::fp32) {
    std::fill_n(grad.as<std::uint32_t>(), grad.count(), nan_bits(DType::fp32));
  } else {
    std::fill_n(grad.as<std::uint16_t>(), grad.count(), std::uint16_t(nan_bits(grad.dtype)));
  }
}

void scale_in_place(Bytes data, float factor, std::uint32_t* flags) {
  const ConstBytes self = data;
  sum_in_rank_order(std::span(&self, 1), factor, data, flags);
}

}  // namespace thinwire
