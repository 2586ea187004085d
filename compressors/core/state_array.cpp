#include "compressors/core/state_array.hpp"

#include <cstring>

#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"

namespace thinwire {
namespace {

THINWIRE_CLONES void widen(const std::uint16_t* from, float* to, std::size_t count) {
  for_prefetched(
      count, [=](std::size_t i) __attribute__((always_inline)) { prefetch_ahead<kAskEvery * sizeof *from>(from + i); },
      [=](std::size_t i) __attribute__((always_inline)) { to[i] = bf16_to_float(from[i]); });
}
// wire_round of finite values, so that the loop vectorises.
THINWIRE_CLONES void narrow(const float* from, std::uint16_t* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t u = float_bits(from[i]), rounded = (u & 0x7fffffffu) + 0x7fffu + ((u >> 16) & 1u);
    to[i] = std::uint16_t(((rounded < 0x7f800000u ? rounded : 0x7f7fffffu) >> 16) | ((u >> 16) & 0x8000u));
  }
}

}  // namespace

void load_state(StateArray from, float* to, std::size_t count) noexcept {
  if (from.narrow()) {
    widen(from.bf16(), to, count);
  } else if (count != 0) {
    std::memcpy(to, from.fp32(), count * sizeof(float));
  }
}

void store_state(const float* from, StateArray to, std::size_t count) noexcept {
  if (to.narrow()) {
    narrow(from, to.bf16(), count);
  } else if (count != 0) {
    std::memcpy(to.fp32(), from, count * sizeof(float));
  }
}

void clear_state(StateArray array, std::size_t count) noexcept {
  if (array.narrow()) std::memset(array.bf16(), 0, count * sizeof(std::uint16_t));
  if (array.fp32() != nullptr) std::memset(array.fp32(), 0, count * sizeof(float));
}

}  // namespace thinwire
