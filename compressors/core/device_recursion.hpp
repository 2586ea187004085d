#pragma once
// The recursion's unfused pieces on a GPU, seen from the host: gradient norms, clip factors and the dense step. Plain C++;
// compressors/feedback/feedback_cuda.cu implements it. Every call enqueues on the stream and @throws Error{device} where a kernel cannot be
// launched.

#include <cstddef>
#include <cstdint>

#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// Elements of one block's work, counted from the start of a segment: a block sum of the norms too.
inline constexpr std::uint32_t kDeviceChunk = 4096;

/// Where a segment lies; what kernels of any family know of it begins with this.
struct DeviceRange {
  std::uint64_t first = 0, count = 0;  ///< elements of the flat buffer
  std::uint32_t first_chunk = 0;
};

/// A table of structs that begin with a DeviceRange, `stride` bytes apart, and for each chunk the segment it belongs to. Device memory.
struct DeviceRanges {
  const std::byte* base = nullptr;
  std::size_t stride = 0, segments = 0, chunks = 0;
  const std::uint32_t* chunk_segment = nullptr;
};

constexpr std::size_t device_chunks(std::size_t count) noexcept { return (count + kDeviceChunk - 1) / kDeviceChunk; }

/// A factor that the host knows, or that lies in device memory because a kernel made it.
struct DeviceFactor {
  float value = 1.0f;
  const float* at = nullptr;

  constexpr DeviceFactor(float known) noexcept : value(known) {}
  constexpr DeviceFactor(const float* where) noexcept : at(where) {}
  THINWIRE_HD float read() const noexcept { return at != nullptr ? *at : value; }
};

/// norms[s] as squared_norms gives them, to the bit. Two kernels; `block_sums`: one double per chunk.
void launch_squared_norms(const DeviceRanges& ranges, ConstBytes grad, double* block_sums, double* norms, Stream stream);

/// factors[s] as clip_factors gives them. One kernel.
void launch_clip_factors(const Recursion& recursion, const DeviceRanges& ranges, const double* norms, DeviceFactor unscale, int world,
                         std::size_t total_numel, float* factors, Stream stream);

/// A segment that stays dense, or a part of one.
struct DeviceDense {
  DeviceRange range;
  std::uint32_t factor = 0;                        ///< which factor is its
  std::uint64_t packed = 0;                        ///< its first element among the packed messages
  float *momentum = nullptr, *residual = nullptr;  ///< averaged: m, null where a parameter has none
};

/// dense_message over segments with state, messages in fp32. One kernel: reads gradient and state, writes state and messages. `beta1`:
/// averaged forms, in the order of `factors`.
void launch_dense_message(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors, float* messages,
                          std::uint32_t* flags, Stream stream, const float* beta1 = nullptr);
/// dense_message over segments without: their elements as they are, in the gradient's dtype. One kernel.
void launch_copy_message(const DeviceRanges& ranges, ConstBytes grad, std::byte* messages, std::uint32_t* flags, Stream stream);
/// settle_dense where `verdict` lacks kFlagNonfinite. One kernel.
void launch_settle_dense(const DeviceRanges& ranges, const std::uint32_t* verdict, Stream stream);

}  // namespace thinwire
