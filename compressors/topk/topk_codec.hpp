#pragma once
// The parts of the codec: workspace, the pass over one segment in its two selections, decoding.

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/codec.hpp"
#include "compressors/core/state_array.hpp"
#include "compressors/feedback/squared_norm.hpp"
#include "compressors/topk/topk_kernels.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::topk {

/// Scratch of one call, carved from the caller's bytes. Encoding and decoding use the same memory in turn.
struct Workspace {
  std::uint16_t* index = nullptr;  ///< staging of one block
  float* value = nullptr;
  std::uint32_t* bitmap = nullptr;      ///< of one block
  std::uint32_t* magnitudes = nullptr;  ///< of the sample, or of the candidates
  std::uint32_t* scratch = nullptr;     ///< of the sample, once more
  std::uint32_t* candidate_index = nullptr;
  float* candidate_value = nullptr;
  float* tile = nullptr;             ///< kTile sums, zero between uses
  std::uint32_t* cursors = nullptr;  ///< 2 × kMaxPayloads
};

inline constexpr std::size_t kTile = 8192;  // elements; divides kBlock: 32 KiB of sums stay in L1
inline constexpr std::size_t kMaxPayloads = 16384;
inline constexpr std::size_t kStreamingBytes = std::size_t(4) << 20;  // outputs at least this large go past the caches

/// @returns the bytes needed; places the parts from `base` on (64-byte aligned) unless it is null.
std::size_t carve(const Plan& plan, const TopKOptions& options, std::byte* base, Workspace* out);

/// One segment of a fused pass: the block is the whole segment; room, wire and staging are filled in per kernel call.
struct SegmentPass {
  const Kernels& kernels;
  Form form;
  DType grad_dtype;
  Block segment;                  ///< without the arrays below where they are narrow
  StateArray residual, estimate;  ///< as they are stored
  std::uint64_t draw;
  double density;
  float floor;
  feedback::SquaredNorm* norm = nullptr;  ///< of the gradient, where somebody asks

  /// Whether kernels, which work on floats, need pieces of the state widened.
  bool narrow() const noexcept { return residual.narrow() || estimate.narrow(); }
};
struct SegmentResult {
  std::uint32_t flags = 0;
};

/// |x| >= a threshold from a sample, up to capacity. `memory`: last threshold in, next one out; may be null.
SegmentResult stream_sampled(const SegmentPass& pass, const SegmentWire& wire, float* memory, const Workspace& workspace,
                             SegmentPacker& packer);
/// The k largest. Where fewer than k or too many candidates come, the whole message in the state is searched. (An element that overflowed
/// in that same step is represented there by its residual; the verdict on such a step is bad, and what was sent returns.)
SegmentResult stream_exact(const SegmentPass& pass, const SegmentWire& wire, const Workspace& workspace, SegmentPacker& packer);

/// The block of elements [first, first + kBlock) of a segment, staging in place.
Block block_at(const SegmentPass& pass, std::size_t first, const Workspace& workspace) noexcept;

// Narrow state, widened piece by piece (narrow.cpp). The same bits as kernels on floats whose state is rounded after the call.

/// A stream kernel over a block of elements [first, first + block.count). What the kernel notes as bits is noted here too. Without
/// block.clear nothing is written: narrow state cannot hold messages until they are chosen, they are made again.
void stream_narrow(const SegmentPass& pass, std::size_t first, const Block& block, StreamKernel kernel, Emitted& emitted);
/// The sample of a segment: its groups, brought together.
std::size_t sample_narrow(const SegmentPass& pass, std::uint32_t* magnitudes);
/// The message of element i before its state is advanced, 0 where nothing may be sent; and what a block keeps if nothing is.
float message_narrow(const SegmentPass& pass, std::size_t i) noexcept;
void advance_narrow(const SegmentPass& pass, std::size_t first, const Block& block);

/// A validated segment of a payload.
struct Entries {
  const std::byte* index = nullptr;
  const std::byte* value = nullptr;
  std::uint32_t kept = 0;
};
/// @throws Error{corrupt_payload} saying what is wrong; the caller knows of which rank and segment.
Entries check_entries(const SegmentWire& wire, DType dtype, std::size_t count, std::uint32_t kept, const std::byte* at);

/// Position of a reader in a segment's entries.
struct Cursor {
  std::uint32_t next = 0, block_end = 0;
};
/// target[i - begin] += value for the entries with begin <= i < end, where [begin, end) is the next range within one block.
void add_range(const Kernels& kernels, const SegmentWire& wire, DType dtype, std::size_t count, const Entries& entries, Cursor& cursor,
               std::size_t begin, std::size_t end, float* target) noexcept;

}  // namespace thinwire::topk
