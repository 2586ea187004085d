// The payload header: what is written is read, what does not belong is refused by name, and fingerprints tell plans apart.

#include "compressors/core/wire.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {
namespace {

using wire::Header;

constexpr std::uint64_t kPlan = 0x0123456789abcdefull, kStep = 41;

std::vector<std::byte> payload_of(const Header& header, std::size_t size) {
  std::vector<std::byte> payload(size);
  wire::write_header(header, host_bytes(payload.data(), payload.size(), DType::u8));
  return payload;
}
ConstBytes view(const std::vector<std::byte>& payload) { return {payload.data(), payload.size(), DType::u8, Place::host, 0}; }
Header valid(std::size_t size) {
  Header header;
  header.codec = wire::kCodecTopK;
  header.segments = 3;
  header.bytes = size;
  header.plan = kPlan;
  header.step = kStep;
  return header;
}
Header read(const std::vector<std::byte>& payload) { return wire::read_header(view(payload), wire::kCodecTopK, kPlan, 3, kStep); }

TEST(WireHeader, IsLittleEndianAtFixedOffsets) {
  Header header = valid(200);
  header.flags = kFlagNonfinite;
  const auto payload = payload_of(header, 200);
  const unsigned char expected[] = {'T', 'W', 'W', 'P', 1,    0,    1,    0,    1,    0,    0,    0,    3,  0, 0, 0, 200, 0, 0, 0,
                                    0,   0,   0,   0,   0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, 41, 0, 0, 0, 0,   0, 0, 0};
  EXPECT_EQ(std::memcmp(payload.data(), expected, sizeof expected), 0);
  for (std::size_t i = sizeof expected; i < 200; ++i) EXPECT_EQ(payload[i], std::byte{0}) << i;
}

TEST(WireHeader, RoundTrips) {
  for (const std::size_t size : {std::size_t(64), std::size_t(68), std::size_t(5000)}) {
    Header header = valid(size);
    header.flags = kFlagNonfinite | kFlagJoined;
    const Header back = read(payload_of(header, size));
    EXPECT_EQ(back.flags, header.flags);
    EXPECT_EQ(back.bytes, size);
    EXPECT_EQ(back.segments, 3u);
  }
}

TEST(WireHeader, RefusesEachWrongFieldByName) {
  const std::vector<std::pair<const char*, std::function<void(Header&)>>> changes = {
      {"magic", [](Header& h) { h.magic ^= 1; }},      {"version", [](Header& h) { h.version = 2; }},
      {"codec", [](Header& h) { h.codec = 0; }},       {"round", [](Header& h) { h.round = 1; }},
      {"flags", [](Header& h) { h.flags = 4; }},       {"flags", [](Header& h) { h.flags = 0x80000001u; }},
      {"segments", [](Header& h) { h.segments = 2; }}, {"bytes", [](Header& h) { h.bytes += 1; }},
      {"bytes", [](Header& h) { h.bytes = ~0ull; }},   {"plan", [](Header& h) { h.plan ^= 1ull << 63; }},
      {"step", [](Header& h) { h.step -= 1; }},
  };
  for (const auto& [field, change] : changes) {
    Header header = valid(128);
    change(header);
    try {
      read(payload_of(header, 128));
      ADD_FAILURE() << field << " was not refused";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::corrupt_payload);
      EXPECT_NE(std::string(e.what()).find(field), std::string::npos) << e.what();
    }
  }
}

TEST(WireHeader, RefusesAnythingTooShort) {
  const auto payload = payload_of(valid(64), 64);
  for (std::size_t size = 0; size < 64; ++size) {
    const std::vector<std::byte> cut(payload.begin(), payload.begin() + std::ptrdiff_t(size));
    EXPECT_THROW(read(cut), Error) << size;
    std::vector<std::byte> room(size);
    EXPECT_THROW(wire::write_header(valid(64), host_bytes(room.data(), size, DType::u8)), Error);
  }
}

// Where the reserved words matter one day, old receivers must not have accepted them: today they are zero and not read.
TEST(WireHeader, EverySingleBitFlipInTheUsedFieldsButKnownFlagsIsRefused) {
  const auto payload = payload_of(valid(64), 64);
  for (std::size_t bit = 0; bit < 40 * 8; ++bit) {
    auto flipped = payload;
    flipped[bit / 8] ^= std::byte(1u << (bit % 8));
    const bool known_flag = bit / 8 == 8 && bit % 8 < 2;
    if (known_flag) {
      EXPECT_NO_THROW(read(flipped));
    } else {
      EXPECT_THROW(read(flipped), Error) << "bit " << bit;
    }
  }
}

TEST(PlanFingerprint, TellsApartWhatReceiversWouldDecodeDifferently) {
  const Segment base{.parameter = 5, .first = 0, .count = 1000, .rows = 10, .columns = 100, .setting = {.density = 0.01}};
  std::set<std::uint64_t> seen;
  const auto note = [&](std::vector<Segment> segments, std::uint64_t salt) {
    EXPECT_TRUE(seen.insert(wire::plan_fingerprint({segments, {}, 0}, salt)).second);
  };
  note({base}, 1);
  note({base}, 2);
  note({}, 1);
  note({base, base}, 1);
  Segment other = base;
  other.parameter = 6;
  note({other}, 1);
  note({base, other}, 1);
  note({other, base}, 1);
  other = base;
  other.count = 1001;
  note({other}, 1);
  other = base;
  other.setting.density = 0.010000001;
  note({other}, 1);
  // Where a segment lies in this rank's buffer and the step are not part of it.
  other = base;
  other.first = 64;
  const std::vector<Segment> moved = {other};
  EXPECT_FALSE(seen.insert(wire::plan_fingerprint({moved, {}, 9}, 1)).second);
}

TEST(HashBytes, DependsOnEveryByteAndOnTheLength) {
  std::vector<unsigned char> data(131, 0);
  std::set<std::uint64_t> seen;
  for (std::size_t n = 0; n <= data.size(); ++n) EXPECT_TRUE(seen.insert(wire::hash_bytes(data.data(), n, 7)).second) << n;
  for (std::size_t i = 0; i < data.size(); ++i)
    for (const int bit : {0, 7}) {
      data[i] ^= static_cast<unsigned char>(1 << bit);
      EXPECT_TRUE(seen.insert(wire::hash_bytes(data.data(), data.size(), 7)).second) << i;
      data[i] ^= static_cast<unsigned char>(1 << bit);
    }
  EXPECT_TRUE(seen.insert(wire::hash_bytes(data.data(), data.size(), 8)).second);
  EXPECT_EQ(wire::hash_bytes(data.data(), data.size(), 7), wire::hash_bytes(data.data(), data.size(), 7));
  std::swap(data[3], data[90]);  // both 0: no change
  EXPECT_FALSE(seen.insert(wire::hash_bytes(data.data(), data.size(), 7)).second);
}

}  // namespace
}  // namespace thinwire
