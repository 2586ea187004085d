#pragma once
// A bucket's plan in device memory: the tables that kernels read, and the small arrays that belong to the bucket. Made once per plan.

#include <cstdint>
#include <memory>
#include <vector>

#include "collectives/bucket_plan.hpp"
#include "collectives/passengers_cuda.hpp"
#include "collectives/watch.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/device.hpp"
#include "compressors/core/device_recursion.hpp"

namespace thinwire {

struct DevicePlan {
  /// @throws Error{device} where the device has no memory for it.
  /// `watch`: null where nothing is looked at.
  DevicePlan(std::shared_ptr<const BucketPlan> bucket, const Codec* codec, const Watch* watch, int world, int rank, int device,
             Stream stream);

  /// The codec's view of the bucket at a step.
  Plan plan(std::uint64_t step) const noexcept;
  /// two_phase: of this rank's part, as the mean lies apart, to be encoded; and to be taken back.
  Plan own_part(std::uint64_t step) const noexcept;
  Plan own_taken(std::uint64_t step) const noexcept;
  /// The same, for decoding the mean of all ranks (BucketPlan::mean_plan).
  Plan mean_plan(std::uint64_t step) const noexcept;
  /// target=momentum: of the compressed segments as `momenta` packs them, to be decoded in true units.
  Plan momentum_plan(std::uint64_t step) const noexcept;

  std::shared_ptr<const BucketPlan> bucket;
  /// Segments as they lie in the bucket: [0] and [1] the groups of passengers, [2] those that are compressed. `packed` of passengers: their
  /// place in the messages of their group.
  DeviceRanges whole[3];
  /// Estimates, and where error feedback is looked at: the compressed segments with their state.
  DeviceRanges compressed;
  std::vector<WatchedSegment> watched;            ///< one per compressed parameter; none where nothing is looked at
  const WatchedSegment* watched_table = nullptr;  ///< the same
  double* probe_sums = nullptr;                   ///< kProbeSums per chunk of `compressed`
  /// Owners: group by group, the parts of each owner, packed as they are sent; and what this rank sums of each group, one after the other.
  DeviceRanges sent[2], owned[2];
  /// Owners: all finished parts, packed as the gather leaves them behind the payloads.
  DeviceRanges finished;
  /// two_phase: what this rank holds back of passengers, as their messages lie in whole[0] and in sent[0].
  DeviceRanges server, sent_server;
  /// target=momentum: all shared momenta of the bucket, packed one after the other, and those of them that stay dense at this step.
  DeviceRanges momenta, dense_momenta;
  std::size_t momentum_count = 0;
  const float *betas = nullptr, *own_betas = nullptr, *passenger_betas = nullptr, *momenta_betas = nullptr;  ///< per segment of each

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
  DeviceBuffer masks_;
  std::vector<Segment> segments_, own_, momentum_segments_;  ///< with masks in device memory
  ConstBytes codec_table_, own_table_, taken_table_, momentum_table_;

  void upload_masks(int device, Stream stream);
  Plan with(Plan plan, ConstBytes table, const float* factor) const noexcept;
};

}  // namespace thinwire
