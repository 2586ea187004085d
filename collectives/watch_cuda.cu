#include "collectives/watch_cuda.hpp"

#include "compressors/core/device_ranges.cuh"

namespace thinwire {
namespace {

using namespace thinwire::cuda;

/// A block of kPartials per parameter. Sums over chunks in the order of block_sum.hpp, over parts in theirs.
__global__ void __launch_bounds__(unsigned(kPartials))
    watch_kernel(DeviceRanges ranges, const WatchedSegment* segments, std::size_t parameters, const double* sums, const double* norms,
                 const float* unscale, std::uint64_t step, Watched* watched, float* limits) {
  __shared__ double partial[kPartials];
  Probe sum;
  for (std::size_t part = blockIdx.x; part < ranges.segments; part += parameters) {
    const DeviceRange& range = range_of(ranges, std::uint32_t(part));
    const std::size_t chunks = device_chunks(range.count);
    double of_part[kProbeSums];
    for (std::size_t k = 0; k < kProbeSums; ++k) {
      double own = 0;
      for (std::size_t b = threadIdx.x; b < chunks; b += kPartials) own += sums[(range.first_chunk + b) * kProbeSums + k];
      __syncthreads();  // the sum before is read
      partial[threadIdx.x] = own;
      of_part[k] = add_in_halves(partial, threadIdx.x);
    }
    Probe probe;
    probe.message = of_part[0], probe.left = of_part[1], probe.stale = of_part[2], probe.followed = of_part[3];
    probe.residual = of_part[4];
    sum += probe;
  }
  if (threadIdx.x != 0) return;
  const WatchedSegment segment = segments[blockIdx.x];
  Watched& own = watched[segment.parameter];
  if (!is_look_due(segment, own, step)) return;
  note_look(segment, own, step, sum, norms[blockIdx.x] * double(*unscale) * double(*unscale));
  limits[segment.parameter] = own.state.eta;
}

__global__ void __launch_bounds__(kThreads) restart_kernel(Watched* watched, std::size_t parameters) {
  const std::size_t p = std::size_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p < parameters) restart_watch(watched[p].state);
}

}  // namespace

void launch_restart_watch(Watched* watched, std::size_t parameters, Stream stream) {
  launch("restart of the watch", restart_kernel, (parameters + kThreads - 1) / kThreads, kThreads, stream, watched, parameters);
}

void launch_watch(const DeviceRanges& ranges, const WatchedSegment* segments, std::size_t parameters, const double* sums,
                  const double* norms, const float* unscale, std::uint64_t step, Watched* watched, float* limits, Stream stream) {
  launch("watch", watch_kernel, parameters, unsigned(kPartials), stream, ranges, segments, parameters, sums, norms, unscale, step, watched,
         limits);
}

}  // namespace thinwire
