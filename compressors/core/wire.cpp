#include "compressors/core/wire.hpp"

#include <bit>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <string>

#include "compressors/core/error.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire::wire {
namespace {

static_assert(std::endian::native == std::endian::little, "payloads are little-endian and written without conversion");

std::string describe(const char* field, std::uint64_t given, std::uint64_t expected) {
  return std::string("payload header: ") + field + " is " + std::to_string(given) + ", expected " + std::to_string(expected);
}

[[noreturn]] void corrupt(const char* field, std::uint64_t given, std::uint64_t expected) {
  fail(Errc::corrupt_payload, describe(field, given, expected));
}

constexpr std::uint64_t mix(std::uint64_t x) noexcept {  // a bijection whose every output bit depends on every input bit
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ull;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

}  // namespace

void write_header(const Header& header, Bytes payload) {
  THINWIRE_EXPECTS(payload.size >= sizeof(Header), "a payload needs " + std::to_string(sizeof(Header)) + " bytes for its header");
  std::memcpy(payload.data, &header, sizeof(Header));
}

Header read_header(ConstBytes payload, CodecId codec, std::uint64_t plan, std::uint32_t segments, std::uint64_t step) {
  if (payload.size < sizeof(Header)) corrupt("length in bytes", payload.size, sizeof(Header));
  Header header;
  std::memcpy(&header, payload.data, sizeof(Header));
  if (header.magic != kMagic) corrupt("magic", header.magic, kMagic);
  if (header.version != kVersion) corrupt("version", header.version, kVersion);
  if (header.codec != codec) corrupt("codec", header.codec, codec);
  if (header.round != 0) corrupt("round", header.round, 0);
  if ((header.flags & ~std::uint32_t(kFlagNonfinite | kFlagJoined)) != 0) corrupt("flags", header.flags, kFlagNonfinite | kFlagJoined);
  if (header.segments != segments) corrupt("segments", header.segments, segments);
  if (header.bytes != payload.size) corrupt("bytes", header.bytes, payload.size);
  if (header.plan != plan) corrupt("plan fingerprint", header.plan, plan);
  if (header.step != step) corrupt("step", header.step, step);
  return header;
}

std::string describe_header_fault(std::uint32_t word, std::uint64_t given, std::uint64_t wanted) {
  constexpr const char* kFields[] = {
      "magic", "version, codec and round", "flags", "segments", "bytes", "bytes", "plan fingerprint", "plan fingerprint", "step", "step"};
  return describe(kFields[word % std::size(kFields)], given, wanted);
}

std::uint64_t hash_bytes(const void* data, std::size_t size, std::uint64_t seed) noexcept {
  // Four independent lanes of eight bytes, so that hashing runs at memory speed rather than at the latency of one multiplication.
  const auto* p = static_cast<const unsigned char*>(data);
  std::uint64_t lane[4] = {mix(seed + 1), mix(seed + 2), mix(seed + 3), mix(seed + 4)};
  std::size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    for (int j = 0; j < 4; ++j) {
      std::uint64_t word;
      std::memcpy(&word, p + i + 8 * j, 8);
      lane[j] = (lane[j] ^ word) * 0x9e3779b97f4a7c15ull;
      lane[j] ^= lane[j] >> 29;
    }
  }
  std::uint64_t h = mix(lane[0]) ^ mix(lane[1] + 1) ^ mix(lane[2] + 2) ^ mix(lane[3] + 3);
  for (; i < size; i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p + i, size - i < 8 ? size - i : 8);
    h = mix(h ^ word);
  }
  return mix(h ^ size);
}

std::uint64_t plan_fingerprint(const Plan& plan, std::uint64_t salt) noexcept {
  std::uint64_t h = mix(mix(salt ^ plan.segments.size()) ^ plan.context);
  for (const Segment& segment : plan.segments) {
    const std::uint64_t fields[3] = {segment.parameter, segment.count, std::bit_cast<std::uint64_t>(segment.setting.density)};
    h = hash_bytes(fields, sizeof fields, h);
  }
  return h;
}

}  // namespace thinwire::wire
