#pragma once
// The seam between what happens to numbers and everything else.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// How payloads of different ranks may be joined.
enum class Combine : std::uint8_t {
  gather,    ///< every rank decodes every payload
  reencode,  ///< an owner may decode, sum and encode again (two_phase)
  sum,       ///< payloads may be summed undecoded
};

struct WireLayout {
  std::size_t part_capacity = 0;  ///< bytes of the payload of one part, header included: equal on all ranks, a multiple of 4
  std::size_t workspace = 0;      ///< bytes of scratch that stream, encode and decode may use
  std::size_t per_payload = 0;    ///< decode may use as many bytes of it per payload, if that is more
};

/// What a pass tells beside its payload, for statistics: one per segment each, or null where nobody asks.
struct PassCounts {
  std::uint32_t* kept = nullptr;  ///< entries sent
  double* norms = nullptr;        ///< Σ g² as squared_norms gives it, at no further pass over memory
};

/// Immutable and shared between threads: all memory between steps belongs to the caller. Calls allocate nothing and never synchronise with
/// the host. Buffers do not overlap, except that `grad` and a decode's `out` may be the same memory in different calls.
class Codec {
 public:
  virtual ~Codec() = default;

  virtual Combine combine() const noexcept = 0;
  /// Exchanges per bucket; the payload of round 1 may need the sum of round 0 (low-rank).
  virtual int rounds() const noexcept { return 1; }
  /// Floats that the codec remembers per parameter between steps; saved and re-sharded with the state.
  virtual std::size_t memory(const Segment& segment) const noexcept = 0;
  /// State name of that memory, "" if there is none.
  virtual const char* memory_name() const noexcept = 0;
  /// The delta in (0, 1] for which ‖decode(encode(x)) − x‖² ≤ (1 − delta)·‖x‖², whatever x is (top-k), or for x as gradients are (sign).
  virtual double nominal_delta(const Segment& segment) const noexcept = 0;
  /// Entries of a segment that are meant to be sent (statistics).
  virtual std::size_t target(const Segment& segment) const noexcept = 0;

  /// Sizes of the plan's payload; depends on segments and settings only. @throws invalid_argument on a setting out of range or a segment
  /// too large.
  virtual WireLayout layout(const Plan& plan) const = 0;

  /// The fused pass: reads gradient (fp32, bf16, fp16; flat buffer of the bucket) and state, writes state and the whole payload (unused
  /// capacity zeroed, header with
  /// `*flags` and what this pass finds). New state = message − decode(payload), to the bit. Non-finite elements enter no state and set
  /// kFlagNonfinite.
  virtual void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
                      std::uint32_t* flags, const PassCounts& counts, Stream stream) const = 0;

  /// The payload of a rank that has nothing to say (a joined rank): no entries, flags as given.
  virtual void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream stream) const = 0;

  /// The unfused piece: encodes an fp32 message (flat buffer of the bucket), keeps no residual. `previous_sum`: round 0's sum, for codecs
  /// of two rounds. With message − decode afterwards it is the oracle of `stream`.
  virtual void encode(int round, const Plan& plan, ConstBytes message, ConstBytes previous_sum, const StateView& state, Bytes workspace,
                      Bytes wire, Stream stream) const = 0;

  /// out[segment] = factor × Σ_r decode(wires[r]), added in the order of `wires`, divided (factor) once after the sum, rounded once to
  /// out.dtype. `out` is the flat buffer of the bucket; elements outside the plan's segments are untouched. ORs the headers' flags, and
  /// kFlagNonfinite for a non-finite output, into *flags. A plan of several parts takes one payload for each, which is decoded alone.
  /// With Plan::mean_estimates the mean is added there first. All payloads are validated before anything is written.
  /// @throws Error{corrupt_payload} naming rank, segment and what is wrong.
  virtual void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
                      Stream stream) const = 0;

  /// residual += decode(own payload): what a bucket with a bad verdict sent was not applied; with an estimate, keep_news. Nothing happens
  /// for a recursion without residual, or where `verdict` is given and lacks kFlagNonfinite.
  virtual void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state,
                         const std::uint32_t* verdict, Stream stream) const = 0;

  /// On a GPU kernels read a plan from a table in device memory (Plan::table), made once per layout, setting and state: `tabulate` writes
  /// its `table_bytes` on the host, 16-byte aligned, for the caller to copy. Flags, counts and grad factors are device memory then too. A
  /// corrupt payload is no exception there: it makes a bad verdict and is left in Plan::report, for `describe` to put into words.
  virtual std::size_t table_bytes(const Plan&) const { return 0; }
  virtual void tabulate(const Recursion&, const Plan&, std::span<const SegmentState>, std::byte*) const {}
  virtual std::string describe(const Plan&, const DeviceReport&) const { return {}; }
};

}  // namespace thinwire
