#pragma once
// Tables of segments as kernels read them (device_recursion.hpp), a block per chunk. Only .cu files include it.

#include "compressors/core/block_sum.hpp"
#include "compressors/core/cuda_device.cuh"
#include "compressors/core/device_recursion.hpp"

namespace thinwire::cuda {

static_assert(kDeviceChunk == kSumBlock);

__device__ inline const DeviceStates& states_of(const DeviceRanges& ranges, std::uint32_t s) {
  return *reinterpret_cast<const DeviceStates*>(ranges.base + s * ranges.stride);
}
__device__ inline const DeviceRange& range_of(const DeviceRanges& ranges, std::uint32_t s) { return states_of(ranges, s).range; }
__device__ inline const DeviceDense& dense_of(const DeviceRanges& ranges, std::uint32_t s) {
  return static_cast<const DeviceDense&>(states_of(ranges, s));
}

/// A chunk and what of it exists.
struct Chunk {
  std::uint32_t segment;
  std::uint64_t start;  ///< element of the segment
  std::uint32_t count;

  __device__ Chunk(const DeviceRanges& ranges, std::uint32_t id) : segment(ranges.chunk_segment[id]) {
    const DeviceRange& range = range_of(ranges, segment);
    start = std::uint64_t(id - range.first_chunk) * kDeviceChunk;
    count = std::uint32_t(range.count - start < kDeviceChunk ? range.count - start : kDeviceChunk);
  }
};

/// Adds kPartials values in halves: i with i + 32, then with i + 16, … By kPartials threads of a block; every thread of it calls.
template <class T>
__device__ inline T add_in_halves(T* partial, unsigned i) {
  for (unsigned width = kPartials / 2; width != 0; width /= 2) {
    __syncthreads();
    if (i < width) partial[i] += partial[i + width];
  }
  __syncthreads();
  return partial[0];
}

}  // namespace thinwire::cuda
