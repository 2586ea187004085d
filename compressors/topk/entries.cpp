// Reading entries back: first whether they are sound, then into sums.

#include <algorithm>
#include <string>

#include "compressors/core/clones.hpp"
#include "compressors/core/error.hpp"
#include "compressors/topk/topk_codec.hpp"

namespace thinwire::topk {
namespace {

[[noreturn]] void corrupt(const std::string& what) { fail(Errc::corrupt_payload, what); }

template <DType dtype>
float value_at(const std::byte* values, std::size_t i) noexcept {
  return load_element<dtype>(values, i);
}

THINWIRE_CLONES bool all_finite_fp32(const std::uint32_t* bits, std::size_t count) {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad |= std::uint32_t((bits[i] & 0x7f800000u) == 0x7f800000u);
  return bad == 0;
}
THINWIRE_CLONES bool all_finite_16(const std::uint16_t* bits, std::size_t count, std::uint16_t exponent) {
  std::uint16_t bad = 0;
  for (std::size_t i = 0; i < count; ++i) bad = std::uint16_t(bad | std::uint16_t((bits[i] & exponent) == exponent));
  return bad == 0;
}
THINWIRE_CLONES std::size_t count_bits(const std::uint32_t* words, std::size_t count) {
  std::size_t bits = 0;
  for (std::size_t i = 0; i < count; ++i) bits += std::size_t(__builtin_popcount(words[i]));
  return bits;
}

bool all_finite(DType dtype, const std::byte* values, std::size_t count) noexcept {
  if (dtype == DType::fp32) return all_finite_fp32(reinterpret_cast<const std::uint32_t*>(values), count);
  return all_finite_16(reinterpret_cast<const std::uint16_t*>(values), count, dtype == DType::bf16 ? 0x7f80 : 0x7c00);
}

THINWIRE_CLONES bool ascends(const std::uint32_t* indices, std::size_t count) {
  std::uint32_t bad = 0;
  for (std::size_t i = 1; i < count; ++i) bad |= std::uint32_t(indices[i] <= indices[i - 1]);
  return bad == 0;
}
THINWIRE_CLONES bool ascends(const std::uint16_t* indices, std::size_t count) {
  std::uint16_t bad = 0;
  for (std::size_t i = 1; i < count; ++i) bad = std::uint16_t(bad | std::uint16_t(indices[i] <= indices[i - 1]));
  return bad == 0;
}

/// First i in [1, count) with indices[i] <= indices[i - 1], else count.
template <class Index>
std::size_t first_descent(const Index* indices, std::size_t count) noexcept {
  if (ascends(indices, count)) return count;
  std::size_t i = 1;
  while (indices[i] > indices[i - 1]) ++i;
  return i;
}

template <class Index>
void check_ascending(const Index* indices, std::size_t count, std::size_t limit, std::size_t base) {
  if (count == 0) return;
  const std::size_t i = first_descent(indices, count);
  if (i != count) {
    corrupt("index " + std::to_string(base + indices[i]) + " follows " + std::to_string(base + indices[i - 1]) + ", indices must ascend");
  }
  if (indices[count - 1] >= limit)
    corrupt("index " + std::to_string(base + indices[count - 1]) + " is not below " + std::to_string(base + limit));
}

template <DType dtype>
void add_entries(const Kernels& kernels, const SegmentWire& wire, std::size_t count, const Entries& entries, Cursor& cursor,
                 std::size_t begin, std::size_t end, float* target) noexcept {
  std::uint32_t c = cursor.next;
  if (wire.form == IndexForm::u32) {
    const auto* index = reinterpret_cast<const std::uint32_t*>(entries.index);
    for (; c < entries.kept && index[c] < end; ++c) target[index[c] - begin] += value_at<dtype>(entries.value, c);
  } else if (wire.form == IndexForm::u16) {
    const std::size_t base = begin / kBlock * kBlock;
    if (begin == base) cursor.block_end = c + reinterpret_cast<const std::uint32_t*>(entries.index)[begin / kBlock];
    const auto* offset = reinterpret_cast<const std::uint16_t*>(entries.index + 4 * blocks_of(count));
    const std::uint32_t stop = cursor.block_end;
    for (; c < stop && offset[c] < end - base; ++c) target[offset[c] - (begin - base)] += value_at<dtype>(entries.value, c);
  } else {
    const auto* words = reinterpret_cast<const std::uint32_t*>(entries.index) + begin / 32;
    c = kernels.add_bitmap[std::size_t(dtype)](words, end - begin, entries.value, c, wire.capacity, target);
  }
  cursor.next = c;
}

}  // namespace

Entries check_entries(const SegmentWire& wire, DType dtype, std::size_t count, std::uint32_t kept, const std::byte* at) {
  if (kept > wire.capacity) corrupt("kept is " + std::to_string(kept) + ", at most " + std::to_string(wire.capacity) + " are allowed");
  if (wire.form == IndexForm::u32) {
    check_ascending(reinterpret_cast<const std::uint32_t*>(at), kept, count, 0);
  } else if (wire.form == IndexForm::u16) {
    const auto* counts = reinterpret_cast<const std::uint32_t*>(at);
    const auto* offsets = reinterpret_cast<const std::uint16_t*>(at + 4 * blocks_of(count));
    std::size_t seen = 0;
    for (std::size_t block = 0; block < blocks_of(count); ++block) {
      if (counts[block] > kept - seen)
        corrupt("blocks up to " + std::to_string(block) + " count " + std::to_string(seen + counts[block]) + " entries, kept is " +
                std::to_string(kept));
      check_ascending(offsets + seen, counts[block], std::min<std::size_t>(count - block * kBlock, kBlock), block * kBlock);
      seen += counts[block];
    }
    if (seen != kept) corrupt("blocks count " + std::to_string(seen) + " entries, kept is " + std::to_string(kept));
  } else if (count != 0) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(at);
    const std::size_t n = (count + 31) / 32;
    const std::size_t seen = count_bits(words, n);
    if (seen != kept) corrupt("the bitmap has " + std::to_string(seen) + " bits, kept is " + std::to_string(kept));
    if (count % 32 != 0 && (words[n - 1] >> (count % 32)) != 0) corrupt("the bitmap has bits past element " + std::to_string(count - 1));
  }
  const std::byte* values = at + wire.index_bytes;
  if (!all_finite(dtype, values, kept)) {
    std::size_t i = 0;
    while (all_finite(dtype, values + i * size_of(dtype), 1)) ++i;
    corrupt("value " + std::to_string(i) + " of " + std::to_string(kept) + " is not finite");
  }
  return {at, values, kept};
}

void add_range(const Kernels& kernels, const SegmentWire& wire, DType dtype, std::size_t count, const Entries& entries, Cursor& cursor,
               std::size_t begin, std::size_t end, float* target) noexcept {
  if (dtype == DType::fp32) {
    add_entries<DType::fp32>(kernels, wire, count, entries, cursor, begin, end, target);
  } else if (dtype == DType::bf16) {
    add_entries<DType::bf16>(kernels, wire, count, entries, cursor, begin, end, target);
  } else {
    add_entries<DType::fp16>(kernels, wire, count, entries, cursor, begin, end, target);
  }
}

}  // namespace thinwire::topk
