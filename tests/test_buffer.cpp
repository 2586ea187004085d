// Scratch that only grows, and the arena: zeroed, aligned, its arrays never a power of two apart.

#include "compressors/core/buffer.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace thinwire {
namespace {

std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

TEST(Buffer, StartsEmptyAndGrowsOnly) {
  Buffer buffer;
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(buffer.size(), 0u);
  EXPECT_FALSE(buffer.reserve(0));
  EXPECT_TRUE(buffer.reserve(1));
  EXPECT_GE(buffer.size(), 1u);
  const std::byte* const before = buffer.data();
  const std::size_t size = buffer.size();
  EXPECT_FALSE(buffer.reserve(size));
  EXPECT_FALSE(buffer.reserve(1));
  EXPECT_EQ(buffer.data(), before);
  EXPECT_EQ(buffer.size(), size);
  EXPECT_TRUE(buffer.reserve(size + 1));
  EXPECT_GT(buffer.size(), size);
}

TEST(Buffer, IsAlignedToPagesAndUsableToTheLastByte) {
  for (const std::size_t bytes : {std::size_t(1), std::size_t(4095), std::size_t(4096), std::size_t(4097), (std::size_t(2) << 20) - 1,
                                  std::size_t(2) << 20, (std::size_t(2) << 20) + 1}) {
    Buffer buffer(bytes);
    EXPECT_EQ(address(buffer.data()) % 4096, 0u) << bytes;
    ASSERT_GE(buffer.size(), bytes);
    std::memset(buffer.data(), 0x5a, buffer.size());
    const Bytes view = buffer.bytes(DType::fp32);
    EXPECT_EQ(view.data, buffer.data());
    EXPECT_EQ(view.count(), buffer.size() / 4);
  }
}

TEST(Buffer, MovesItsMemory) {
  Buffer a(100);
  const std::byte* const data = a.data();
  const Buffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
}

TEST(Arena, IsZeroedAlignedAndDisjoint) {
  const std::size_t counts[] = {1, 0, 1000003, 16, 524288};
  const Arena arena(counts);
  ASSERT_EQ(arena.arrays(), 5u);
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> ranges;
  for (std::size_t j = 0; j < 5; ++j) {
    ASSERT_EQ(arena.count(j), counts[j]);
    float* const array = arena.array(j);
    EXPECT_EQ(address(array) % 64, 0u) << j;  // whole cache lines, so that vector loads of one array never share a line with another
    for (std::size_t i = 0; i < counts[j]; ++i) ASSERT_EQ(array[i], 0.0f);
    ranges.emplace_back(address(array), address(array + counts[j]));
  }
  for (std::size_t a = 0; a < 5; ++a)
    for (std::size_t b = a + 1; b < 5; ++b) EXPECT_TRUE(ranges[a].second <= ranges[b].first || ranges[b].second <= ranges[a].first);
  for (std::size_t j = 0; j < 5; ++j) std::fill_n(arena.array(j), counts[j], float(j + 1));  // the last element of each is writable
  for (std::size_t j = 0; j < 5; ++j)
    for (std::size_t i = 0; i < counts[j]; ++i) ASSERT_EQ(arena.array(j)[i], float(j + 1));
}

// Streams whose distance is a power of two (or near one: what counts is the address modulo the caches' ways) run at half speed.
TEST(Arena, StaggersArraysOfPowerOfTwoSizes) {
  for (const std::size_t count : {std::size_t(1) << 18, std::size_t(1) << 20, std::size_t(1) << 22}) {
    const std::size_t counts[] = {count, count, count};
    const Arena arena(counts);
    for (int a = 0; a < 3; ++a)
      for (int b = a + 1; b < 3; ++b) {
        const std::uintptr_t distance = address(arena.array(std::size_t(b))) - address(arena.array(std::size_t(a)));
        EXPECT_EQ(distance % (std::size_t(1) << 20), std::size_t(b - a) * 1344) << count;
        EXPECT_NE(distance % 4096, 0u);
      }
  }
}

TEST(Arena, MayBeEmptyAndMoves) {
  const Arena nothing;
  EXPECT_EQ(nothing.arrays(), 0u);
  const std::size_t zero[] = {0, 0};
  const Arena empty(zero);
  EXPECT_EQ(empty.arrays(), 2u);
  EXPECT_EQ(empty.count(1), 0u);

  const std::size_t counts[] = {100};
  Arena a(counts);
  a.array(0)[99] = 7;
  Arena b = std::move(a);
  EXPECT_EQ(b.array(0)[99], 7);
  const std::size_t others[] = {50};
  b = Arena(others);
  EXPECT_EQ(b.count(0), 50u);
  EXPECT_EQ(b.array(0)[49], 0);
}

}  // namespace
}  // namespace thinwire
