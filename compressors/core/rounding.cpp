#include "compressors/core/rounding.hpp"

#include <algorithm>

#include "compressors/core/clones.hpp"

namespace thinwire {
namespace {

// Finite are all results if the largest magnitude's bits are, compared once: so the loops vectorise.
THINWIRE_CLONES bool store_fp32(const float* x, float factor, float* out, std::size_t n) {
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = x[i] * factor;
    top = std::max(top, float_bits(out[i]) & 0x7fffffffu);
  }
  return top < 0x7f800000u;
}
THINWIRE_CLONES bool store_bf16(const float* x, float factor, std::uint16_t* out, std::size_t n) {
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = float_to_bf16(x[i] * factor);
    top = std::max<std::uint32_t>(top, out[i] & 0x7fffu);
  }
  return top < 0x7f80u;
}
THINWIRE_CLONES bool store_fp16(const float* x, float factor, std::uint16_t* out, std::size_t n) {
  std::uint32_t top = 0;
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = float_to_fp16(x[i] * factor);
    top = std::max<std::uint32_t>(top, out[i] & 0x7fffu);
  }
  return top < 0x7c00u;
}

}  // namespace

bool store_scaled(const float* x, float factor, DType dtype, void* out, std::size_t n) noexcept {
  if (dtype == DType::bf16) return store_bf16(x, factor, static_cast<std::uint16_t*>(out), n);
  if (dtype == DType::fp16) return store_fp16(x, factor, static_cast<std::uint16_t*>(out), n);
  return store_fp32(x, factor, static_cast<float*>(out), n);
}

}  // namespace thinwire
