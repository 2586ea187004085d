#pragma once
// The vocabulary of our kernels: launches, elements of any dtype, warp and block sums, ordered compaction by decoupled look-back. Only .cu
// files include it.

#include <cuda_runtime.h>

#include <cuda/atomic>

#include <cstddef>
#include <cstdint>
#include <string>

#include "compressors/core/dtype.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire::cuda {

inline constexpr unsigned kThreads = 256, kWarps = kThreads / 32, kFullWarp = 0xffffffffu;

/// Enqueues `blocks` blocks of `threads`; none does nothing. @throws Error{device} naming the kernel.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::size_t blocks, unsigned threads, Stream stream, Arguments... arguments) {
  if (blocks == 0) return;
  THINWIRE_EXPECTS(blocks < std::size_t(1) << 31, std::string(name) + ": " + std::to_string(blocks) + " blocks, at most 2^31 - 1 can run");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream.get();
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // told here: it is no error of somebody's next launch
    fail(Errc::device, std::string(name) + " could not be launched: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
  }
}

/// A two-byte element of a gradient or a payload. fp16 by the hardware's conversion where there is one: fp16_to_float's bits, but for those
/// of a NaN, which no result keeps.
template <DType dtype>
__device__ inline float half_to_float(std::uint16_t h) {
  if constexpr (dtype == DType::bf16) return bf16_to_float(h);
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  return fp16_to_float(h);
#endif
}

/// Rounds x once to `dtype` and stores it as element i. @returns whether what is stored is finite.
__device__ inline bool store_element(std::byte* base, DType dtype, std::size_t i, float x) {
  if (dtype == DType::fp32) {
    reinterpret_cast<float*>(base)[i] = x;
    return is_finite(x);
  }
  const std::uint16_t half = dtype == DType::bf16 ? float_to_bf16(x) : float_to_fp16(x);
  reinterpret_cast<std::uint16_t*>(base)[i] = half;
  const std::uint32_t exponent = dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
  return (half & exponent) != exponent;
}

__device__ inline unsigned lane() { return threadIdx.x % 32; }
__device__ inline unsigned warp() { return threadIdx.x / 32; }
__device__ inline unsigned lanes_below() { return (1u << lane()) - 1; }

template <class T>
__device__ inline T warp_sum(T x) {
  for (int delta = 16; delta != 0; delta /= 2) x += __shfl_xor_sync(kFullWarp, x, delta);
  return x;
}

/// Sum over lanes 0 … own.
template <class T>
__device__ inline T warp_inclusive_sum(T x) {
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const T below = __shfl_up_sync(kFullWarp, x, delta);
    if (lane() >= delta) x += below;
  }
  return x;
}

/// The sum over a block of kThreads, for every thread. `scratch`: kWarps words of shared memory, free again after the block's next barrier.
template <class T>
__device__ inline T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  T sum = 0;
  for (unsigned w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

/// Zeroes this block's share of `words` words.
__device__ inline void clear_share(std::uint32_t* words, std::size_t count) {
  for (std::size_t i = std::size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += std::size_t(gridDim.x) * blockDim.x)
    words[i] = 0;
}

/// Blocks take their work in the order in which they begin to run, so that whoever waits waits for a block that runs. All threads of the
/// block call it; `shared`: one word of shared memory.
__device__ inline std::uint32_t take_ticket(std::uint32_t* counter, std::uint32_t* shared) {
  if (threadIdx.x == 0) *shared = atomicAdd(counter, 1u);
  __syncthreads();
  return *shared;
}

// Decoupled look-back (Merrill and Garland 2016): each chunk of a sequence publishes its own sum, then its inclusive prefix; whoever needs
// the prefix before it adds up what its predecessors have published. One word per chunk, zero before: two bits of status, 62 of value. A
// word is all that one chunk tells another: no reader goes on to memory that the writer wrote before it, so nothing needs ordering around
// the words and all of it is relaxed. An acquire would have every poll drop the lines that the block has loaded, a release would wait for
// its stores.

inline constexpr std::uint64_t kOwnSum = std::uint64_t(1) << 62, kInclusive = std::uint64_t(2) << 62, kValueMask = kOwnSum - 1;

using Published = ::cuda::atomic_ref<std::uint64_t, ::cuda::thread_scope_device>;

/// By one thread, as early as it can.
__device__ inline void publish(std::uint64_t* words, std::uint32_t chunk, std::uint64_t own) {
  Published(words[chunk]).store((chunk == 0 ? kInclusive : kOwnSum) | own, ::cuda::memory_order_relaxed);
}

/// By one whole warp, after publish: the sum of all chunks before this one.
__device__ inline std::uint64_t look_back(std::uint64_t* words, std::uint32_t chunk, std::uint64_t own) {
  if (chunk == 0) return 0;
  std::uint64_t before = 0;
  for (std::int64_t at = std::int64_t(chunk) - 1 - lane();; at -= 32) {
    std::uint64_t word = kInclusive;  // before the first chunk: a prefix of 0
    if (at >= 0) word = Published(words[at]).load(::cuda::memory_order_relaxed);
    while (__any_sync(kFullWarp, word >> 62 == 0) != 0) {
      __nanosleep(20);
      if (word >> 62 == 0) word = Published(words[at]).load(::cuda::memory_order_relaxed);
    }
    const unsigned inclusive = __ballot_sync(kFullWarp, (word & kInclusive) != 0);
    const unsigned last = inclusive != 0 ? unsigned(__ffs(int(inclusive))) - 1 : 31;
    before += warp_sum(lane() <= last ? word & kValueMask : std::uint64_t(0));
    if (inclusive != 0) break;
  }
  if (lane() == 0) Published(words[chunk]).store(kInclusive | (before + own), ::cuda::memory_order_relaxed);
  return before;
}

}  // namespace thinwire::cuda
