#include "compressors/topk/topk_wire.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "compressors/core/error.hpp"

namespace thinwire::topk {

SegmentWire segment_wire(const Segment& segment, const TopKOptions& options) {
  const double density = segment.setting.density;
  THINWIRE_EXPECTS(density > 0 && density <= 1, "topk: density=" + std::to_string(density) + " of parameter " +
                                                    std::to_string(segment.parameter) + " is outside (0, 1]");
  THINWIRE_EXPECTS(segment.count <= std::numeric_limits<std::uint32_t>::max(),
                   "topk: parameter " + std::to_string(segment.parameter) + " has " + std::to_string(segment.count) +
                       " elements in one segment, at most 2^32 - 1 are allowed");
  SegmentWire out;
  const std::size_t n = segment.count;
  if (n == 0) return out;
  // 1e-9: a density written as k/n must give k, whatever its last bit.
  out.k = std::clamp<std::size_t>(std::size_t(std::max(0.0, std::ceil(density * double(n) - 1e-9))), 1, n);
  out.capacity = options.exact ? out.k : std::min(n, out.k + (out.k + 3) / 4);

  const std::size_t bytes[3] = {4 * out.capacity, 4 * blocks_of(n) + round_up(2 * out.capacity, 4), 4 * ((n + 31) / 32)};
  if (options.index == TopKOptions::Index::automatic) {
    out.form = IndexForm(std::min_element(bytes, bytes + 3) - bytes);
  } else {
    out.form = IndexForm(int(options.index) - int(TopKOptions::Index::u32));
  }
  out.index_bytes = bytes[int(out.form)];
  out.value_bytes = round_up(out.capacity * size_of(options.wire), 4);
  return out;
}

std::uint64_t options_salt(const TopKOptions& options) noexcept {
  return std::uint64_t(wire::kCodecTopK) | std::uint64_t(options.wire) << 8 | std::uint64_t(options.index) << 16 |
         std::uint64_t(options.exact) << 24;
}

void SegmentPacker::append(std::size_t block, const std::uint16_t* offsets, const float* values, std::size_t count,
                           const std::uint32_t* bitmap, std::size_t noted) noexcept {
  const auto base = std::uint32_t(block * kBlock);
  if (wire_.form == IndexForm::u32) {
    auto* out = reinterpret_cast<std::uint32_t*>(at_) + kept_;
    for (std::size_t i = 0; i < count; ++i) out[i] = base + offsets[i];
  } else if (wire_.form == IndexForm::u16) {
    reinterpret_cast<std::uint32_t*>(at_)[block] = std::uint32_t(count);
    if (count != 0) std::memcpy(at_ + 4 * blocks_of(count_) + 2 * kept_, offsets, 2 * count);
  } else {
    auto* words = reinterpret_cast<std::uint32_t*>(at_) + base / 32;
    const std::size_t all = (std::min<std::size_t>(count_ - base, kBlock) + 31) / 32;
    if (noted != 0) std::memcpy(words, bitmap, noted / 8);
    std::memset(words + noted / 32, 0, 4 * (all - noted / 32));
    for (std::size_t i = count; i-- > 0 && offsets[i] >= noted;) words[offsets[i] / 32] |= 1u << (offsets[i] % 32);
  }
  narrow_(values, count, dtype_, at_ + wire_.index_bytes + kept_ * size_of(dtype_));
  kept_ += count;
}

void SegmentPacker::finish() noexcept {
  if (wire_.form != IndexForm::bitmap) {
    const std::size_t used = wire_.form == IndexForm::u32 ? 4 * kept_ : 4 * blocks_of(count_) + 2 * kept_;
    std::memset(at_ + used, 0, wire_.index_bytes - used);
  }
  const std::size_t used = kept_ * size_of(dtype_);
  std::memset(at_ + wire_.index_bytes + used, 0, wire_.value_bytes - used);
}

}  // namespace thinwire::topk
