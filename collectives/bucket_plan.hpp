#pragma once
// What one bucket looks like to the engine: which of its parameters are compressed at this step, which stay dense beside the payload, and
// where everything lies in the buffers that travel. Built once per layout and setting, then reused.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "collectives/reducer.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// A parameter with its state and what was decided about it for the current step.
struct ParameterSlot {
  Parameter parameter;
  std::size_t numel = 0;
  std::uint32_t rows = 0, columns = 0;
  bool compressible = false;     ///< large enough, two dimensions, and the config has a codec
  std::string never_reason;      ///< why not
  SegmentState state;            ///< in the arena
  std::size_t memory_count = 0;  ///< floats at state.memory
  Setting setting;               ///< at the current step
  bool dense_now = false;        ///< by exchange=auto's rule, as long as the setting stays
};

/// Segments that stay dense beside a payload, packed one after the other.
struct Passengers {
  std::vector<Segment> segments;
  std::vector<SegmentState> states;
  DType dtype = DType::fp32;  ///< of their messages: fp32 where there is state, else the gradient's
  bool stateful = false;
  std::size_t count = 0;  ///< elements

  std::size_t bytes() const noexcept { return count * size_of(dtype); }
  Plan plan(std::uint64_t step) const noexcept { return {segments, {}, step}; }
};

/// What of both groups goes to one owner: the owned part of every segment, empty ones too.
struct OwnerShare {
  Passengers parts[2];
};

struct BucketPlan {
  std::vector<std::uint32_t> ids;
  DType dtype = DType::fp32;
  std::size_t count = 0;     ///< elements of the bucket
  bool whole_dense = false;  ///< a dense step: the transport's all-reduce

  std::vector<Segment> segments;  ///< compressed ones
  std::vector<SegmentState> states;
  std::vector<std::uint32_t> part_end;
  WireLayout layout;

  /// [0] with state (fp32 messages), [1] without (messages in the gradient's dtype): in this order everywhere, so that fp32 stays aligned.
  /// On a whole dense step all segments are in [0], in bucket order.
  Passengers passengers[2];
  bool owners = false;             ///< passengers are too many to travel raw: their parts go to owners, who send back the finished mean
  std::vector<OwnerShare> shares;  ///< owners: per rank, in the order of the all-to-all's send buffer
  std::vector<std::size_t> send_bytes, recv_bytes;  ///< owners: per rank, the all-to-all; a multiple of 4 each
  std::size_t contribution = 0;                     ///< bytes of one rank's share of the gather: payload, then passengers
  std::string name;                                 ///< for errors: "conv1.weight … fc.bias (12 parameters)"

  std::uint64_t context = 0;  ///< a hash of all of the bucket's parameters, passengers included, and of its dtype

  Plan plan(std::uint64_t step) const noexcept { return {segments, part_end, step, context}; }
  std::size_t sent_bytes() const noexcept;  ///< owners: of the whole send buffer
};

/// Passengers of at most this many bytes travel raw in the gather and are summed by everyone: one collective less.
inline constexpr std::size_t kRawPassengerBytes = 64 * 1024;

/// exchange=auto's rule: whether gathering this segment sends no less than a ring all-reduce of it. With one rank nothing is sent either
/// way, and dense is simpler.
bool dense_sends_less(const Codec& codec, const Segment& segment, DType dtype, int world);

/// `codec` may be null only on whole dense steps. @throws what Codec::layout throws.
BucketPlan make_bucket_plan(std::span<const std::uint32_t> ids, DType dtype, bool whole_dense, const std::vector<ParameterSlot>& slots,
                            const Codec* codec, const Recursion& recursion, int world, int rank);

}  // namespace thinwire
