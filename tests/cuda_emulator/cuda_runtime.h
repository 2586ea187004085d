#pragma once
// CUDA's kernel language and the little of its runtime that thinwire uses, on the CPU: the same .cu files compiled by the host compiler, so
// that what kernels compute is tested where there is no GPU. Every thread of a block is a fiber and runs until it has to wait; the order in
// which they run is shuffled, so that a missing barrier shows. Blocks run side by side on a few threads, so that waiting between blocks is
// real. What it cannot show: speed, the device's memory model, and what nvcc makes of the code.

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace thinwire::emulator {

/// Runs `thread_main(context)` once for each thread of each block.
void run_grid(unsigned blocks, unsigned threads, void (*thread_main)(void*), void* context);
void block_barrier();
/// All lanes of the calling warp hand in a value and get everybody's: 32 words, of exited lanes 0. Valid until the warp's next exchange.
const std::uint64_t* warp_exchange(std::uint64_t value);
/// Which lanes of the warp took part in its last exchange: those that had not exited.
unsigned warp_lanes();
/// Lets other fibers, and other blocks, run.
void yield();
/// Kernels launched so far in this process.
std::size_t launches();
/// Calls that would wait for the device, and copies from device to host memory.
std::size_t waits();
std::size_t copies_to_host();

// Device memory is the host's, but known as the device's.
void* allocate(std::size_t bytes);
void release(void* p);
bool on_device(const void* p);
void note_wait();
void note_copy(const void* to, const void* from);

inline unsigned lane() { return threadIdx.x % 32; }

template <class T>
std::uint64_t to_word(T x) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}
template <class T>
T from_word(std::uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
template <class T>
T from_lane(T x, unsigned source) {
  return from_word<T>(warp_exchange(to_word(x))[source]);
}

}  // namespace thinwire::emulator

// --- the kernel language ---------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { thinwire::emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { thinwire::emulator::warp_exchange(0); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(unsigned) { thinwire::emulator::yield(); }

inline unsigned __ballot_sync(unsigned, int predicate) {
  const std::uint64_t* all = thinwire::emulator::warp_exchange(predicate != 0);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline unsigned __match_any_sync(unsigned, unsigned value) {
  const std::uint64_t* all = thinwire::emulator::warp_exchange(value);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= unsigned(all[i] == value && ((thinwire::emulator::warp_lanes() >> i) & 1u) != 0) << i;
  return bits;
}
template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return thinwire::emulator::from_lane(x, unsigned(source) % 32);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned delta) {
  const unsigned lane = thinwire::emulator::lane();
  return thinwire::emulator::from_lane(x, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned, T x, unsigned delta) {
  const unsigned lane = thinwire::emulator::lane();
  return thinwire::emulator::from_lane(x, lane + delta > 31 ? lane : lane + delta);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return thinwire::emulator::from_lane(x, thinwire::emulator::lane() ^ unsigned(mask));
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }

template <class T>
T atomicAdd(T* p, T x) {
  return std::atomic_ref<T>(*p).fetch_add(x, std::memory_order_relaxed);
}
inline unsigned atomicOr(unsigned* p, unsigned x) { return std::atomic_ref<unsigned>(*p).fetch_or(x, std::memory_order_relaxed); }
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long wanted) {
  std::atomic_ref<unsigned long long>(*p).compare_exchange_strong(expected, wanted, std::memory_order_seq_cst);
  return expected;
}
inline unsigned long long atomicCAS_system(unsigned long long* p, unsigned long long expected, unsigned long long wanted) {
  return atomicCAS(p, expected, wanted);
}
inline void __threadfence_system() { __threadfence(); }

// --- the runtime ------------------------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(arguments...)};
  thinwire::emulator::run_grid(
      config->gridDim.x, config->blockDim.x, [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); },
      &call);
  return cudaSuccess;
}
enum { cudaHostAllocMapped = 1, cudaHostAllocPortable = 2, cudaStreamNonBlocking = 1 };
struct cudaDeviceProp {
  char name[64] = "emulated on the CPU";
  int major = 0, minor = 0;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) { return *properties = {}, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
/// Nothing larger than a test says with THINWIRE_EMULATED_LARGEST.
inline cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (const char* text = std::getenv("THINWIRE_EMULATED_LARGEST"); text != nullptr && bytes > std::strtoull(text, nullptr, 10))
    return cudaErrorMemoryAllocation;
  *p = thinwire::emulator::allocate(bytes);
  return *p != nullptr || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* p) { return thinwire::emulator::release(p), cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *p != nullptr || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeHost = 1, cudaMemoryTypeDevice = 2, cudaMemoryTypeManaged = 3 };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  *attributes = {thinwire::emulator::on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, 0};
  return cudaSuccess;
}
/// As much as a test says with THINWIRE_EMULATED_FREE, or plenty.
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const char* text = std::getenv("THINWIRE_EMULATED_FREE");
  *total = std::size_t(1) << 40;
  *free = text != nullptr ? std::strtoull(text, nullptr, 10) : *total;
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  thinwire::emulator::note_copy(to, from);
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return thinwire::emulator::note_wait(), cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(std::uintptr_t(1));  // everything is done when its call returns
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new std::chrono::steady_clock::time_point, cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return *event = std::chrono::steady_clock::now(), cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(*end - *begin).count();
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
inline const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorMemoryAllocation"; }
