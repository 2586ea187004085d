#include "compressors/sign/sign_wire.hpp"

#include <cstring>
#include <string>

#include "compressors/core/error.hpp"

namespace thinwire::sign {
namespace {

std::uint64_t salt_of(const SignOptions& options) noexcept {
  const std::uint64_t fields[2] = {options.block, std::uint64_t(options.scale)};
  return wire::hash_bytes(fields, sizeof fields, wire::kCodecSign);
}

std::uint64_t fingerprint(const Plan& plan, std::span<const Segment> part, const SignOptions& options) noexcept {
  Plan own = plan;
  own.segments = part;
  return wire::plan_fingerprint(own, salt_of(options));
}

}  // namespace

void check_options(const SignOptions& options) {
  THINWIRE_EXPECTS(options.block % 8 == 0, "sign: block=" + std::to_string(options.block) + " is not a multiple of 8");
}

void check_recursion(const Recursion& recursion, const Plan& plan, const StateView& state) {
  THINWIRE_EXPECTS(recursion.kind != Recursion::Kind::momentum_correction, "sign: momentum correction belongs to sparse codecs");
  THINWIRE_EXPECTS(!recursion.grid, "sign: what it sends lies on no grid of bf16 numbers");
  THINWIRE_EXPECTS(!recursion.averaged || state.beta1 != nullptr || plan.segments.empty(), "sign: an averaged gradient needs beta1");
}

PartWire part_wire(std::span<const Segment> part, const SignOptions& options) noexcept {
  PartWire out;
  for (const Segment& segment : part) {
    out.scales += scales_of(options, segment.count);
    out.bits += bit_bytes(segment.count);
  }
  return out;
}

std::size_t parts_of(const Plan& plan) noexcept { return std::max<std::size_t>(plan.part_end.size(), 1); }

std::span<const Segment> part_of(const Plan& plan, std::size_t r) noexcept {
  if (plan.part_end.empty()) return plan.segments;
  const std::size_t first = r == 0 ? 0 : plan.part_end[r - 1];
  return plan.segments.subspan(first, plan.part_end[r] - first);
}

std::size_t part_capacity(const Plan& plan, const SignOptions& options) noexcept {
  std::size_t bytes = plan.payload_bytes;
  for (std::size_t r = 0; r < parts_of(plan); ++r) bytes = std::max(bytes, part_wire(part_of(plan, r), options).bytes());
  return bytes;
}

wire::Header payload_header(const Plan& plan, std::span<const Segment> part, const SignOptions& options, std::size_t bytes,
                            std::uint32_t flags) noexcept {
  wire::Header header;
  header.codec = wire::kCodecSign;
  header.flags = flags;
  header.segments = std::uint32_t(part.size());
  header.bytes = bytes;
  header.plan = fingerprint(plan, part, options);
  header.step = plan.step;
  return header;
}

std::string describe_scale_fault(std::size_t place, std::size_t scales, float scale) {
  return "scale " + std::to_string(place) + " of " + std::to_string(scales) + " is " + std::to_string(scale) +
         "; scales are finite and not negative";
}

std::uint32_t check_payload(const Plan& plan, const SignOptions& options, ConstBytes wire, std::size_t rank) {
  // The text is made where something is wrong only: a sound payload allocates nothing.
  const auto whose = [rank] { return "payload of rank " + std::to_string(rank); };
  const PartWire layout = part_wire(plan.segments, options);
  wire::Header header;
  try {
    header = wire::read_header(wire, wire::kCodecSign, fingerprint(plan, plan.segments, options), std::uint32_t(plan.segments.size()),
                               plan.step);
  } catch (const Error& error) { fail(error.code(), whose() + ": " + error.what()); }
  if (wire.size < layout.bytes())
    fail(Errc::corrupt_payload,
         whose() + " has " + std::to_string(wire.size) + " bytes, this plan's has at least " + std::to_string(layout.bytes()));
  for (std::size_t i = 0; i < layout.scales; ++i) {
    float scale;
    std::memcpy(&scale, wire.data + sizeof(wire::Header) + 4 * i, 4);
    if (is_finite(scale) && !(scale < 0.0f)) continue;
    fail(Errc::corrupt_payload, whose() + ": " + describe_scale_fault(i, layout.scales, scale));
  }
  return header.flags;
}

}  // namespace thinwire::sign
