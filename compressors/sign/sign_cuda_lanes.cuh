#pragma once
// What the CUDA kernels of the sign codec share: how a block's threads divide 4096 elements, groups of them in registers, and where a
// segment's scales lie.

#include "compressors/core/cuda_device.cuh"
#include "compressors/core/dtype.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/sign/sign_cuda_kernels.hpp"
#include "compressors/sign/sign_math.hpp"

namespace thinwire::sign {

using namespace thinwire::cuda;

static_assert(kDeviceChunk == kSumBlock);
inline constexpr unsigned kGroup = 4;                        // consecutive elements of one thread: 16 bytes of state
inline constexpr unsigned kElements = kSumBlock / kThreads;  // of one thread
inline constexpr unsigned kGroups = kElements / kGroup;      // and kThreads · kGroup elements lie between two of them

/// First element of a thread's group v.
__device__ inline std::uint32_t group_start(unsigned v) { return (v * kThreads + threadIdx.x) * kGroup; }

__device__ inline bool aligned(const void* p, std::size_t to) { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

/// A whole group from its words: 16 bytes of fp32, or the first 8.
template <DType dtype>
__device__ inline void to_floats(const uint4& raw, float* to) {
  if constexpr (dtype == DType::fp32) {
    to[0] = bits_float(raw.x), to[1] = bits_float(raw.y), to[2] = bits_float(raw.z), to[3] = bits_float(raw.w);
  } else {
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) to[j] = half_to_float<dtype>(std::uint16_t((j < 2 ? raw.x : raw.y) >> (j % 2 * 16)));
  }
}

/// The first `in` of a group of the gradient from element i on, zeros after them.
__device__ inline void load_group(const std::byte* base, DType dtype, std::size_t i, std::uint32_t in, float* to) {
  const std::byte* const at = base + i * size_of(dtype);
  if (in >= kGroup && dtype == DType::fp32 && aligned(at, 16)) {
    const float4 x = *reinterpret_cast<const float4*>(at);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if (in >= kGroup && dtype != DType::fp32 && aligned(at, 8)) {
    const uint2 raw = *reinterpret_cast<const uint2*>(at);
    const uint4 words{raw.x, raw.y, 0, 0};
    dtype == DType::bf16 ? to_floats<DType::bf16>(words, to) : to_floats<DType::fp16>(words, to);
  } else {
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) to[j] = j < in ? load_element(base, dtype, i + j) : 0.0f;
  }
}
/// The same of state, which is aligned.
__device__ inline void load_group(const float* from, std::uint32_t in, float* to) {
  if (in >= kGroup) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j) to[j] = j < in ? from[j] : 0.0f;
  }
}
__device__ inline void store_group(float* to, std::uint32_t in, const float* from) {
  if (in >= kGroup) {
    *reinterpret_cast<float4*>(to) = float4{from[0], from[1], from[2], from[3]};
  } else {
#pragma unroll  // with a bound of its own the group would leave the registers
    for (unsigned j = 0; j < kGroup; ++j)
      if (j < in) to[j] = from[j];
  }
}

/// The same of state that may be narrow.
__device__ inline void load_group(const StateArray& from, std::uint32_t in, float* to) {
  if (!from.narrow()) return load_group(from.fp32(), in, to);
  load_group(reinterpret_cast<const std::byte*>(from.bf16()), DType::bf16, 0, in, to);
}
__device__ inline void store_group(const StateArray& to, std::uint32_t in, const float* from) {
  if (!to.narrow()) return store_group(to.fp32(), in, from);
  if (in >= kGroup) {
    const auto two = [](float low, float high) {
      return float_bits(wire_round(low, DType::bf16)) >> 16 | float_bits(wire_round(high, DType::bf16));
    };
    *reinterpret_cast<uint2*>(to.bf16()) = uint2{two(from[0], from[1]), two(from[2], from[3])};
  } else {
#pragma unroll
    for (unsigned j = 0; j < kGroup; ++j)
      if (j < in) to.set(j, from[j]);
  }
}

/// Bit j: element i + j of a segment is one of the first `in` and alive. i is a multiple of kGroup.
__device__ inline std::uint32_t live_group(const std::uint8_t* live, std::uint64_t i, std::uint32_t in) {
  return live_bits(live, i, in >= kGroup ? kGroup : in);
}

/// What live messages x leave behind.
__device__ inline void leave_group(float scale, std::uint32_t bits, std::uint32_t alive, float* x) {
#pragma unroll
  for (unsigned j = 0; j < kGroup; ++j)
    if (((alive >> j) & 1u) != 0) feedback::leave(x[j], value_of(((bits >> j) & 1u) != 0, scale), x[j]);
}

__device__ inline float* scales_of_segment(std::byte* wire, const DeviceSegment& segment) {
  return reinterpret_cast<float*>(wire + segment.scales_at);
}
__device__ inline const float* scales_of_segment(const std::byte* wire, const DeviceSegment& segment) {
  return reinterpret_cast<const float*>(wire + segment.scales_at);
}

/// Sets kFlagNonfinite, without an atomic once it is set.
__device__ inline void raise(std::uint32_t* flags) {
  if ((*static_cast<volatile std::uint32_t*>(flags) & kFlagNonfinite) == 0) atomicOr(flags, std::uint32_t(kFlagNonfinite));
}

/// A chunk's place, and which scale is an element's: one division per chunk, and one of 32 bits per group where blocks are short.
struct Chunk {
  std::uint32_t segment;
  std::uint64_t start;  ///< element of the segment
  std::uint32_t count;
  std::uint64_t first_scale, block;
  std::uint64_t past;  ///< elements of the first scale's block before the chunk

  __device__ Chunk(const DeviceTable& table, std::uint32_t id) : segment(table.chunk_segment[id]) {
    const DeviceSegment& own = table.segments[segment];
    start = std::uint64_t(id - own.range.first_chunk) * kDeviceChunk;
    const std::uint64_t left = own.range.count - start;
    count = std::uint32_t(left < kDeviceChunk ? left : kDeviceChunk);
    block = own.block;
    first_scale = start / block;
    past = start % block;
  }
  __device__ std::uint64_t scale(std::uint32_t i) const {
    return first_scale + (block >= kDeviceChunk ? std::uint64_t(past + i >= block) : (std::uint32_t(past) + i) / std::uint32_t(block));
  }
};

}  // namespace thinwire::sign
