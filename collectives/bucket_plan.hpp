#pragma once
// What one bucket looks like to the engine: which of its parameters are compressed at this step, which stay dense beside the payload, and
// where everything lies in the buffers that travel. Built once per layout and setting, then reused.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "collectives/ownership.hpp"
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
  DType dtype = DType::fp32;     ///< of its gradient when that was decided

  Range owned{};                     ///< two_phase: the part of a compressible parameter that this rank owns
  float* server_residual = nullptr;  ///< of that part
  // target=momentum
  float* shared_momentum = nullptr;
  std::size_t momentum_at = 0;  ///< its place in the arena's array of momenta
  float beta1 = 0;
  std::vector<std::uint8_t> live;  ///< Segment::live; empty: all
  /// Elements that are not live.
  std::size_t masked() const noexcept;
};

/// Segments that stay dense beside a payload, packed one after the other.
struct Passengers {
  std::vector<Segment> segments;
  std::vector<SegmentState> states;
  DType dtype = DType::fp32;  ///< of their messages: fp32 where there is state, else the gradient's
  bool stateful = false;
  std::size_t count = 0;     ///< elements
  std::vector<float> betas;  ///< averaged: beta1 per segment
  /// two_phase: what this rank's owned parts hold back, one per segment; null where nothing. A dense step sends it on.
  struct Owned {
    std::size_t first = 0, count = 0;  ///< within the segment
    float* residual = nullptr;
  };
  std::vector<Owned> owned;

  std::size_t bytes() const noexcept { return count * size_of(dtype); }
  Plan plan(std::uint64_t step) const noexcept { return {segments, {}, step}; }
};

/// What of both groups goes to one owner: the owned part of every segment, empty ones too.
struct OwnerShare {
  Passengers parts[2];
};

/// target=momentum: where a parameter's shared momentum is, and where in the bucket what becomes of it.
struct SharedMomentum {
  std::uint32_t parameter = 0;
  std::size_t first = 0, count = 0;  ///< in the bucket
  float* momentum = nullptr;
  float beta1 = 0;
  const std::uint8_t* live = nullptr;
  bool dense = false;       ///< at this step
  std::size_t message = 0;  ///< dense: its first element among the packed messages of passengers[0]
};

/// The owner's side of two_phase, whatever the workers use: EF14 on the mean.
inline constexpr Recursion kOwner{Recursion::Kind::error_feedback, 1.0f};

/// What two_phase knows beside the plan whose parts go to their owners.
struct TwoPhase {
  std::vector<Segment> whole;  ///< the compressed parameters uncut: part r of whole[s] is segment r × whole.size() + s
  std::vector<Segment> own;    ///< this rank's part, one segment after the other from 0 on: where the mean lies before it is encoded again
  std::vector<SegmentState> own_states;  ///< {server_residual}
  std::vector<SegmentState> own_taken;   ///< for take-backs: {momentum, server_residual} where the target is the momentum
  std::vector<float> own_betas;
  std::size_t own_count = 0;  ///< elements
  std::size_t slot = 0;       ///< bytes from one rank's share of the all-to-all to the next
  std::size_t workspace = 0;
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
  std::vector<float> betas;            ///< averaged: beta1 per segment
  std::vector<float*> mean_estimates;  ///< estimate: H per segment
  Recursion recursion;                 ///< of this bucket's messages
  bool two_phase = false;
  TwoPhase phases;
  std::vector<SharedMomentum> momenta;     ///< of all compressible parameters, where the target is the momentum
  std::vector<Segment> momentum_segments;  ///< the compressed segments as they lie in the arena's array of momenta

  /// [0] with state (fp32 messages), [1] without (messages in the gradient's dtype): in this order everywhere, so that fp32 stays aligned.
  /// On a whole dense step all segments are in [0], in bucket order.
  Passengers passengers[2];
  bool owners = false;             ///< passengers are too many to travel raw: their parts go to owners, who send back the finished mean
  std::vector<OwnerShare> shares;  ///< owners: per rank, in the order of the all-to-all's send buffer
  std::vector<std::size_t> send_bytes, recv_bytes;  ///< owners: per rank, the all-to-all; a multiple of 4 each
  std::vector<std::size_t> share_first;             ///< owners: where each rank's share begins in the send buffer
  std::size_t contribution = 0;                     ///< bytes of one rank's share of the gather: payload, then passengers
  std::string name;                                 ///< for errors: "conv1.weight … fc.bias (12 parameters)"

  std::uint64_t context = 0;  ///< a hash of all of the bucket's parameters, passengers included, and of its dtype

  Plan plan(std::uint64_t step) const noexcept { return {segments, part_end, step, context}; }
  /// The same, for decoding the mean of all ranks: where there are estimates it is added to them, and `scale` of that comes out.
  Plan mean_plan(std::uint64_t step, float scale) const noexcept {
    Plan out = plan(step);
    out.mean_estimates = mean_estimates;
    out.output.factor = scale;
    return out;
  }
  /// Whether a rank without data takes part with a gradient of 0: of the shared momentum every rank owes beta1·m, which owners that take
  /// back subtract in full; and an estimate that stayed what it is would go on being that rank's share of the mean.
  bool speaks_without_data(bool joined) const noexcept {
    return joined && (recursion.averaged || recursion.kind == Recursion::Kind::estimate);
  }
  std::size_t sent_bytes() const noexcept;  ///< owners: of the whole send buffer
  /// two_phase: the part that this rank owns, as it is encoded again: payloads of all parts are of one size.
  Plan own_part(std::uint64_t step) const noexcept {
    Plan out{phases.own, {}, step, context};
    out.payload_bytes = layout.part_capacity;
    return out;
  }
};

/// Passengers of at most this many bytes travel raw in the gather and are summed by everyone: one collective less.
inline constexpr std::size_t kRawPassengerBytes = 64 * 1024;

/// Whether owners decode, sum and encode again: exchange=two_phase, and auto with a codec that allows it.
bool uses_two_phase(const Config& config, const Codec& codec) noexcept;

/// Why a tensor that may be compressed is sent densely all the same.
enum class DenseRule {
  none,
  alone,      ///< a world of one, where owners or a shared momentum would only round
  sends_less  ///< exchange=auto: gathering it sends no less than a ring all-reduce; with one rank nothing is sent either way
};
DenseRule dense_rule(const Config& config, const Codec& codec, const Segment& segment, DType dtype, int world);

/// Bytes of scratch that an engine takes for one bucket.
std::size_t scratch_bytes(const BucketPlan& bucket, std::size_t world) noexcept;

/// `codec` may be null only on whole dense steps. @throws what Codec::layout throws.
BucketPlan make_bucket_plan(std::span<const std::uint32_t> ids, DType dtype, bool whole_dense, const std::vector<ParameterSlot>& slots,
                            const Codec* codec, const Recursion& recursion, int world, int rank, bool two_phase = false);

}  // namespace thinwire
