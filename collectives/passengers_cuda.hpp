#pragma once
// What passengers.hpp does, on a GPU, seen from the host: sums in rank order, and what a verdict does. Plain C++; passengers_cuda.cu
// implements it. Every call enqueues one kernel on the stream and @throws Error{device} where it cannot be launched.

#include <cstddef>
#include <cstdint>

#include "compressors/core/device_recursion.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// out[range] = factor × Σ_r message r, in rank order, rounded once; kFlagNonfinite into *flags where a result is not finite. `ranges`:
/// DeviceDense, whose `packed` says where a segment lies in a message.
void launch_sum(const DeviceRanges& ranges, const RankMessages& messages, DeviceFactor factor, Bytes out, std::uint32_t* flags,
                Stream stream);
/// data *= factor, in place.
void launch_scale(Bytes data, float factor, std::uint32_t* flags, Stream stream);
/// out[range] = packed[range], in out's dtype.
void launch_place(const DeviceRanges& ranges, const std::byte* packed, Bytes out, Stream stream);

/// What kernels read of a bucket's loss scale.
struct DeviceScales {
  float unscale = 1;       ///< 1 / loss scale
  float mean = 1;          ///< 1 / world × loss scale: of messages in true units
  float loss = 1;          ///< loss scale
  float norm_unscale = 1;  ///< `unscale` when norms were last taken
};
/// The beginning of a bucket: *flags = 0, and *scales of its loss scale, as the host's engine rounds them. `mean`: 1 / world; `norms`:
/// whether norms are taken of it. A loss scale that is not a positive number is left in *wrong (mapped host memory: its bits, and
/// kWrongScale) and makes the verdict bad where `judged`: where the flags reach all ranks.
inline constexpr std::uint64_t kWrongScale = std::uint64_t(1) << 32;
void launch_begin(DeviceFactor loss_scale, float mean, bool norms, bool judged, std::uint32_t* flags, DeviceScales* scales,
                  std::uint64_t* wrong, Stream stream);

/// add_server_residuals: messages[packed + i] += world × residual[i].
void launch_add_server_residuals(const DeviceRanges& ranges, int world, float* messages, Stream stream);

/// *to |= *flags.
void launch_add_flags(const std::uint32_t* flags, std::uint32_t* to, Stream stream);
/// *count = 1 where *flags has kFlagNonfinite, else 0; and back: kFlagNonfinite where *count is not 0.
void launch_count_flag(const std::uint32_t* flags, float* count, Stream stream);
void launch_read_flag(const float* count, std::uint32_t* flags, Stream stream);

/// Every element becomes NaN where *flags has kFlagNonfinite, which then joins *step_flags.
void launch_verdict(Bytes grad, const std::uint32_t* flags, std::uint32_t* step_flags, Stream stream);

/// What a device engine counts in device memory.
struct DeviceCounters {
  std::uint32_t step_flags = 0;  ///< of the buckets of the step so far
  std::uint32_t started = 1;     ///< a finite step has been seen
  std::uint64_t nonfinite_steps = 0;
};
/// The end of a step: counts it, and zeroes `state` (floats) where no finite step has been seen.
void launch_end_step(DeviceCounters* counters, std::uint32_t* verdict, Stream stream);
void launch_clear_unless_started(const DeviceCounters* counters, float* state, std::size_t count, Stream stream);

}  // namespace thinwire
