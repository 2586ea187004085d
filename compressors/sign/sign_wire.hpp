#pragma once
// Where everything lies in a payload of signs (docs/wire_format.md): header, the scales of all segments, the bits of all segments, zeros up
// to a multiple of 8 and, where a plan has several parts, up to the largest part's size.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/sign/sign.hpp"

namespace thinwire::sign {

/// @throws Error{invalid_argument} on a block that is no multiple of 8.
void check_options(const SignOptions& options);
/// @throws Error{invalid_argument} on momentum correction, and on an averaged gradient without beta1.
void check_recursion(const Recursion& recursion, const Plan& plan, const StateView& state);

constexpr std::size_t block_of(const SignOptions& options, std::size_t count) noexcept {
  return options.block == 0 ? std::max<std::size_t>(count, 1) : options.block;
}
constexpr std::size_t scales_of(const SignOptions& options, std::size_t count) noexcept {
  const std::size_t block = block_of(options, count);
  return (count + block - 1) / block;
}
constexpr std::size_t bit_bytes(std::size_t count) noexcept { return (count + 7) / 8; }

/// Bytes of one part's payload.
struct PartWire {
  std::size_t scales = 0;  ///< of all segments, in floats, from sizeof(Header) on
  std::size_t bits = 0;    ///< of all segments, in bytes, after the scales

  std::size_t bits_offset() const noexcept { return sizeof(wire::Header) + 4 * scales; }
  std::size_t bytes() const noexcept { return round_up(bits_offset() + bits, 8); }
};
PartWire part_wire(std::span<const Segment> part, const SignOptions& options) noexcept;

/// Segments of part r. A plan that names no parts is one.
std::span<const Segment> part_of(const Plan& plan, std::size_t r) noexcept;
std::size_t parts_of(const Plan& plan) noexcept;
/// Bytes of every part's payload: the largest part's.
std::size_t part_capacity(const Plan& plan, const SignOptions& options) noexcept;

/// The header of a payload of `part`, of `bytes` bytes.
wire::Header payload_header(const Plan& plan, std::span<const Segment> part, const SignOptions& options, std::size_t bytes,
                            std::uint32_t flags) noexcept;
/// Checks everything about a payload that is not a bit of an element. @returns the header's flags. @throws Error{corrupt_payload} naming
/// the rank and what is wrong.
std::uint32_t check_payload(const Plan& plan, const SignOptions& options, ConstBytes wire, std::size_t rank);

/// What is wrong with a scale, after whose payload it is in.
std::string describe_scale_fault(std::size_t place, std::size_t scales, float scale);

}  // namespace thinwire::sign
