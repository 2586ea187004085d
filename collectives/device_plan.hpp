#pragma once
// A bucket's plan in device memory: the tables that kernels read, and the small arrays that belong to the bucket. Made once per plan.

#include <cstdint>
#include <memory>
#include <vector>

#include "collectives/bucket_plan.hpp"
#include "collectives/passengers_cuda.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/device_recursion.hpp"

namespace thinwire {

struct DevicePlan {
  /// @throws Error{device} where the device has no memory for it.
  DevicePlan(std::shared_ptr<const BucketPlan> bucket, const Codec* codec, const Recursion& recursion, int world, int rank, int device,
             Stream stream);

  /// The codec's view of the bucket at a step.
  Plan plan(std::uint64_t step) const noexcept;

  std::shared_ptr<const BucketPlan> bucket;
  /// Segments as they lie in the bucket: [0] and [1] the groups of passengers, [2] those that are compressed. `packed` of passengers: their
  /// place in the messages of their group.
  DeviceRanges whole[3];
  /// Owners: group by group, the parts of each owner, packed as they are sent; and what this rank sums of each group, one after the other.
  DeviceRanges sent[2], owned[2];
  /// Owners: all finished parts, packed as the gather leaves them behind the payloads.
  DeviceRanges finished;

  std::uint32_t *flags = nullptr, *kept = nullptr;  ///< one; per compressed segment
  double *norms[3] = {}, *block_sums = nullptr;     ///< per segment, as `whole`
  float* factors[3] = {};
  DeviceScales* scales = nullptr;
  DeviceReport* report = nullptr;
  volatile std::uint64_t* wrong_scale = nullptr;  ///< as launch_begin leaves it; 0: none
  std::uint64_t last_used = 0;                    ///< a count of the engine's

 private:
  DeviceBuffer tables_, arrays_;
  MappedBuffer mapped_;
  ConstBytes codec_table_;
};

}  // namespace thinwire
