#pragma once
// The watch on a GPU, seen from the host. Plain C++; watch_cuda.cu implements it.

#include <cstddef>
#include <cstdint>

#include "collectives/watch_math.hpp"
#include "compressors/core/device_recursion.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// Watch::note of `parameters` parameters whose parts are the segments of `ranges`, part by part: adds up the probes' sums of their chunks,
/// and where a look is due keeps what it says in watched[parameter] and limits[parameter]. `norms`: ‖g‖² per parameter, to be multiplied
/// by *unscale twice. One kernel. @throws Error{device}.
void launch_watch(const DeviceRanges& ranges, const WatchedSegment* segments, std::size_t parameters, const double* sums,
                  const double* norms, const float* unscale, std::uint64_t step, Watched* watched, float* limits, Stream stream);

/// Watch::restart. One kernel.
void launch_restart_watch(Watched* watched, std::size_t parameters, Stream stream);

}  // namespace thinwire
