#pragma once
// Where a segment's entries lie in a payload (docs/wire_format.md), and how they get there.

#include <cstddef>
#include <cstdint>

#include "compressors/core/plan.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire::topk {

/// Elements per block: offsets within one fit 16 bits, and a block's gradient and state are what a kernel call works on.
inline constexpr std::uint32_t kBlock = 65536;

constexpr std::size_t blocks_of(std::size_t count) noexcept { return (count + kBlock - 1) / kBlock; }
enum class IndexForm : std::uint8_t {
  u32,     ///< u32 index[capacity]
  u16,     ///< u32 count[blocks], then u16 offset[capacity]
  bitmap,  ///< bit i % 32 of u32 word i / 32
};

/// Depends on the segment's count and density and on the options alone.
struct SegmentWire {
  std::size_t k = 0;         ///< entries meant to be sent
  std::size_t capacity = 0;  ///< entries that can be sent
  IndexForm form = IndexForm::u32;
  std::size_t index_bytes = 0, value_bytes = 0;  ///< multiples of 4; the values follow the indices

  std::size_t bytes() const noexcept { return index_bytes + value_bytes; }
};

/// @throws Error{invalid_argument} on a density outside (0, 1] or more than 2^32 − 1 elements.
SegmentWire segment_wire(const Segment& segment, const TopKOptions& options);

/// Offset of the first segment's indices: header and kept[segments] come first.
constexpr std::size_t entries_offset(std::size_t segments) noexcept { return sizeof(wire::Header) + 4 * segments; }

/// What sender and receiver must agree on beside the segments.
std::uint64_t options_salt(const TopKOptions& options) noexcept;

/// Rounded floats (wire_round) to the wire's dtype, exactly.
using Narrow = void (*)(const float* values, std::size_t count, DType wire, std::byte* out);

/// Writes a segment's entries, block after block in order, every block once.
class SegmentPacker {
 public:
  SegmentPacker(const SegmentWire& wire, DType dtype, std::size_t count, std::byte* at, Narrow narrow) noexcept
      : wire_(wire), dtype_(dtype), count_(count), at_(at), narrow_(narrow) {}

  std::size_t room() const noexcept { return wire_.capacity - kept_; }
  std::uint32_t kept() const noexcept { return std::uint32_t(kept_); }
  /// Ascending offsets within the block, and their values as they will be decoded. count <= room(). The offsets below `noted`, a multiple
  /// of 32, are also the bits of `bitmap`.
  void append(std::size_t block, const std::uint16_t* offsets, const float* values, std::size_t count,
              const std::uint32_t* bitmap = nullptr, std::size_t noted = 0) noexcept;
  /// Zeroes what no entry used.
  void finish() noexcept;

 private:
  SegmentWire wire_;
  DType dtype_;
  std::size_t count_;
  std::byte* at_;
  Narrow narrow_;
  std::size_t kept_ = 0;
};

}  // namespace thinwire::topk
