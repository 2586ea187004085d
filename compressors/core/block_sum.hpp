#pragma once
// The fixed order of block sums (DESIGN: numerics), the same bits on every ISA and device. Element i of a block of at most kSumBlock goes
// to fp32 partial i mod kPartials in rising i; the partials are added in halves; sums over several blocks repeat this over the block sums
// in double.

#include <cstddef>

#include "compressors/core/dtype.hpp"

namespace thinwire {

inline constexpr std::size_t kSumBlock = 4096, kPartials = 64;

/// i with i + 32, then with i + 16, … 1. The partials are spent.
template <class T>
THINWIRE_HD inline T add_in_halves(T* partial) noexcept {
  for (std::size_t width = kPartials / 2; width != 0; width /= 2)
    for (std::size_t i = 0; i < width; ++i) partial[i] += partial[i + width];
  return partial[0];
}

}  // namespace thinwire
