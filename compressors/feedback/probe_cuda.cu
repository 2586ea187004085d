// Probes on a GPU: probe.cpp's sums, in its order.

#include "compressors/core/device_ranges.cuh"
#include "compressors/feedback/probe_math.hpp"

namespace thinwire {
namespace {

using namespace thinwire::cuda;
using namespace thinwire::feedback;

/// What one thread, a partial of the order of block_sum.hpp, adds up of its chunk.
template <class Visit>
__device__ Probe add_up(const DeviceRanges& ranges, const Chunk& chunk, const std::byte* grad, DType dtype, const float* factors,
                        const float* beta1, const Visit& visit) {
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  const float factor = factors != nullptr ? factors[dense.factor] : 1.0f;
  const ProbedSegment segment{limited_eta(dense.eta, dense.eta_limit), beta1 != nullptr ? beta1[dense.factor] : 0.0f,
                              dense.average != nullptr};
  Probe own;
  for (std::uint32_t j = threadIdx.x; j < chunk.count; j += kPartials) {
    const std::size_t i = chunk.start + j;
    float g;
    if (!is_live(dense.live, i) || !news(load_element(grad, dtype, dense.range.first + i) * factor, g)) continue;
    own += visit(segment, g,
                 ProbedElement{dense.momentum != nullptr ? dense.momentum[i] : 0.0f, dense.residual ? dense.residual[i] : 0.0f,
                               dense.estimate ? dense.estimate[i] : 0.0f, dense.average != nullptr ? dense.average[i] : 0.0f});
  }
  return own;
}

/// By all threads: the sum of `own` over the block, to *to.
__device__ inline void put_sum(double own, double* partial, double* to) {
  __syncthreads();  // the sum before is read
  partial[threadIdx.x] = own;
  const double sum = add_in_halves(partial, threadIdx.x);
  if (threadIdx.x == 0) *to = sum;
}

__global__ void __launch_bounds__(unsigned(kPartials)) message_kernel(Recursion recursion, DeviceRanges ranges, const std::byte* grad,
                                                                      DType dtype, const float* factors, const float* beta1, double* sums) {
  __shared__ double partial[kPartials];
  const Chunk chunk(ranges, blockIdx.x);
  const auto visit = [&](const ProbedSegment& segment, float g, const ProbedElement& element) {
    const double x = probed_message(recursion, segment, g, element);
    Probe out;
    out.message = x * x;
    return out;
  };
  const Probe own = add_up(ranges, chunk, grad, dtype, factors, beta1, visit);
  put_sum(own.message, partial, sums + blockIdx.x * kProbeSums);
}

__global__ void __launch_bounds__(unsigned(kPartials))
    rest_kernel(Recursion recursion, DeviceRanges ranges, const std::byte* grad, DType dtype, const float* factors, double* sums) {
  __shared__ double partial[kPartials];
  const Chunk chunk(ranges, blockIdx.x);
  const auto visit = [&](const ProbedSegment& segment, float g, const ProbedElement& element) {
    return probed_rest(recursion, segment, g, element);
  };
  const Probe own = add_up(ranges, chunk, grad, dtype, factors, nullptr, visit);
  double* const to = sums + blockIdx.x * kProbeSums;
  put_sum(own.left, partial, to + 1);
  put_sum(own.stale, partial, to + 2);
  put_sum(own.followed, partial, to + 3);
  put_sum(own.residual, partial, to + 4);
}

}  // namespace

void launch_probe_messages(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors,
                           const float* beta1, double* sums, Stream stream) {
  launch("probe of messages", message_kernel, ranges.chunks, unsigned(kPartials), stream, recursion, ranges, grad.data, grad.dtype, factors,
         recursion.averaged ? beta1 : nullptr, sums);
}

void launch_probe_rest(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors, double* sums,
                       Stream stream) {
  launch("probe of what is left", rest_kernel, ranges.chunks, unsigned(kPartials), stream, recursion, ranges, grad.data, grad.dtype,
         factors, sums);
}

}  // namespace thinwire
