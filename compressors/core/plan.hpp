#pragma once
// A plan says what one call works on: segments of a flat buffer, none of which crosses a parameter. So the same calls serve a bucket of
// forty layers with forty densities and the part of it that one rank owns.

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/dtype.hpp"
#include "compressors/core/span.hpp"

namespace thinwire {

/// Mapped host memory in which kernels leave what they found wrong; the host reads it at its next call, without waiting for the GPU.
struct DeviceReport {
  std::uint64_t corrupt = 0;            ///< the first unsound payload, as its codec describes it; 0: none. Written last
  std::uint64_t given = 0, wanted = 0;  ///< what was found there, and what would have been sound
  std::uint64_t claimed = 0;            ///< whoever changes it may write the rest
};

/// What the ratio policy decides per segment and step. Codecs read the member that is theirs.
struct Setting {
  double density = 1.0;  ///< top-k: kept / total, in (0, 1]
  float eta = 0.0f;      ///< EControl: the share of the residual that is fed back
  bool operator==(const Setting&) const = default;
};

/// Whether element i of a segment is live (Segment::live).
THINWIRE_HD inline bool is_live(const std::uint8_t* live, std::size_t i) noexcept {
  return live == nullptr || ((live[i / 8] >> (i % 8)) & 1u) != 0;
}

/// Bit j: whether element i + j is live, for the first `n` of them; all lie in one byte of the mask.
THINWIRE_HD inline std::uint32_t live_bits(const std::uint8_t* live, std::size_t i, std::uint32_t n) noexcept {
  const std::uint32_t there = (1u << n) - 1;
  return live == nullptr || n == 0 ? there : there & (std::uint32_t(live[i / 8]) >> (i % 8));
}

struct Segment {
  std::uint32_t parameter = 0;          ///< id within the reducer: the parameter's place in its constructor's list
  std::size_t first = 0;                ///< first element in the flat buffer
  std::size_t count = 0;                ///< elements
  std::uint32_t rows = 0, columns = 0;  ///< the parameter as a matrix: first dimension × the rest
  Setting setting;
  const std::uint8_t* live =
      nullptr;  ///< bit i % 8 of byte i / 8 is 1 where element i is live; null: all. Dead elements have no state and decode to 0
};

/// Where decoded values end: as dtype(value × factor).
struct Output {
  DType dtype = DType::fp32;
  float factor = 1.0f;
  bool operator==(const Output&) const = default;
};

struct Plan {
  std::span<const Segment> segments;
  std::span<const std::uint32_t>
      part_end;               ///< segments [part_end[r-1], part_end[r]) go to rank r; one part for a gather, one per rank for two_phase
  std::uint64_t step = 0;     ///< synchronised steps before this one
  std::uint64_t context = 0;  ///< a hash of what else sender and receiver must agree on: the rest of the bucket

  /// Payloads that are decoded alone, each into its own place of the output: a codec whose values allow it rounds them so that the output
  /// rounds nothing.
  Output output = {};
  /// Recursion::Kind::estimate: one per segment, where H lies. Decoding adds its mean there, and output.factor × H is what it writes.
  std::span<float* const> mean_estimates = {};
  /// Payloads are at least so large, zero-padded: those of parts of different sizes travel as the largest's.
  std::size_t payload_bytes = 0;

  ConstBytes table = {};                 ///< on a GPU: what Codec::tabulate says of this plan, in device memory
  DeviceReport* report = nullptr;        ///< on a GPU: where decoding reports
  const float* factor = nullptr;         ///< on a GPU: where decode finds its factor; null: in its argument
  const float* output_factor = nullptr;  ///< on a GPU: where output.factor is; null: there
};

}  // namespace thinwire
