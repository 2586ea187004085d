#pragma once
// The header of a payload (docs/wire_format.md). Little-endian, 64 bytes, one per bucket and rank. Bytes from a peer are untrusted.

#include <cstdint>
#include <string>

#include "compressors/core/dtype.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/span.hpp"

namespace thinwire::wire {

inline constexpr std::uint32_t kMagic = 0x50575754;  // "TWWP"
inline constexpr std::uint16_t kVersion = 1;

struct Header {
  std::uint32_t magic = kMagic;
  std::uint16_t version = kVersion;
  std::uint8_t codec = 0;   ///< CodecId
  std::uint8_t round = 0;   ///< 0 unless the codec has several rounds
  std::uint32_t flags = 0;  ///< Flag bits of the sender's whole bucket
  std::uint32_t segments = 0;
  std::uint64_t bytes = 0;  ///< of the whole payload, this header included
  std::uint64_t plan = 0;   ///< plan_fingerprint: sender and receiver worked on the same segments with the same settings
  std::uint64_t step = 0;
  std::uint64_t reserved[3] = {0, 0, 0};
};
static_assert(sizeof(Header) == 64);

enum CodecId : std::uint8_t { kCodecNone = 0, kCodecTopK = 1, kCodecSign = 2 };

/// Writes `header` at the start of `payload` (host, at least 64 bytes).
void write_header(const Header& header, Bytes payload);

/// Reads and checks the header against what the receiver knows. @throws Error{corrupt_payload} naming the field, its value and what was
/// expected.
Header read_header(ConstBytes payload, CodecId codec, std::uint64_t plan, std::uint32_t segments, std::uint64_t step);

/// DeviceReport::corrupt of a payload: what is wrong, of which rank, and where (of a header: its 32-bit word). Faults from 1 on are each
/// codec's own.
inline constexpr unsigned kHeaderFault = 0;
struct DeviceFault {
  unsigned fault = 0;
  std::uint32_t rank = 0, place = 0;
};
THINWIRE_HD constexpr std::uint64_t pack_fault(unsigned fault, std::uint32_t rank, std::uint32_t place) noexcept {
  return place | std::uint64_t(rank) << 32 | (std::uint64_t(fault) + 1) << 48;
}
constexpr DeviceFault unpack_fault(std::uint64_t corrupt) noexcept {
  return {unsigned(corrupt >> 48) - 1, std::uint32_t(corrupt >> 32) & 0xffff, std::uint32_t(corrupt)};
}
/// The words of read_header for one that a GPU refused at that word.
std::string describe_header_fault(std::uint32_t word, std::uint64_t given, std::uint64_t wanted);

/// A hash of segments (parameter, count, setting), of the plan's context and of `salt`, equal where two ranks decode each other's payloads
/// alike.
std::uint64_t plan_fingerprint(const Plan& plan, std::uint64_t salt) noexcept;

/// 64-bit hash of bytes, for fingerprints of configurations and replicas. Not cryptographic.
std::uint64_t hash_bytes(const void* data, std::size_t size, std::uint64_t seed) noexcept;

}  // namespace thinwire::wire
