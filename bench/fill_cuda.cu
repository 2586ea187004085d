#include <algorithm>

#include "bench/fill.hpp"
#include "bench/kernels_data.hpp"
#include "compressors/core/cuda_device.cuh"

namespace thinwire::bench {
namespace {

using namespace thinwire::cuda;

template <bool normal>
__global__ void __launch_bounds__(kThreads) fill_kernel(std::byte* out, DType dtype, std::size_t count, float width, std::uint64_t seed) {
  for (std::size_t i = std::size_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += std::size_t(gridDim.x) * kThreads)
    store_element(out, dtype, i, normal ? normal_at(seed, i, width) : uniform_at(seed, i, width));
}

std::size_t blocks_for(std::size_t count) { return std::min<std::size_t>((count + 8 * kThreads - 1) / (8 * kThreads), 4096); }

}  // namespace

void fill_normal(Bytes out, float sigma, std::uint64_t seed, Stream stream) {
  launch("fill", fill_kernel<true>, blocks_for(out.count()), kThreads, stream, out.data, out.dtype, out.count(), sigma, seed);
}
void fill_uniform(Bytes out, float bound, std::uint64_t seed, Stream stream) {
  launch("fill", fill_kernel<false>, blocks_for(out.count()), kThreads, stream, out.data, out.dtype, out.count(), bound, seed);
}

}  // namespace thinwire::bench
