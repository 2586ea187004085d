#pragma once
// Element types of gradients and of values on the wire, and the one place where their rounding is decided.

#include <bit>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define THINWIRE_HD __host__ __device__
#else
#define THINWIRE_HD
#endif

namespace thinwire {

enum class DType : std::uint8_t { fp32 = 0, bf16 = 1, fp16 = 2, u8 = 3 };  // values are part of the wire format; u8 = raw bytes

THINWIRE_HD constexpr std::size_t size_of(DType dtype) noexcept { return dtype == DType::fp32 ? 4 : dtype == DType::u8 ? 1 : 2; }
constexpr const char* to_string(DType dtype) noexcept {
  return dtype == DType::fp32 ? "fp32" : dtype == DType::bf16 ? "bf16" : dtype == DType::fp16 ? "fp16" : "u8";
}

THINWIRE_HD constexpr std::uint32_t float_bits(float x) noexcept { return std::bit_cast<std::uint32_t>(x); }
THINWIRE_HD constexpr float bits_float(std::uint32_t u) noexcept { return std::bit_cast<float>(u); }

/// |x| without touching the sign of NaN handling: clears the sign bit.
THINWIRE_HD constexpr float magnitude(float x) noexcept { return bits_float(float_bits(x) & 0x7fffffffu); }
THINWIRE_HD constexpr bool is_finite(float x) noexcept { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

THINWIRE_HD constexpr float bf16_to_float(std::uint16_t h) noexcept { return bits_float(std::uint32_t(h) << 16); }

/// Round to nearest even by integers: the same bits on every ISA and as __float2bfloat16_rn; denormals kept; NaN gives 0x7fc0.
THINWIRE_HD constexpr std::uint16_t float_to_bf16(float x) noexcept {
  const std::uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return std::uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

THINWIRE_HD constexpr float fp16_to_float(std::uint16_t h) noexcept {
  const std::uint32_t sign = std::uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  return bits_float(sign | float_bits(float(mantissa) * 0x1p-24f));  // zero and denormals: exact product
}

/// Round to nearest even; overflow gives infinity, NaN gives 0x7e00 (IEEE, as F16C and __float2half_rn up to the NaN's payload).
THINWIRE_HD constexpr std::uint16_t float_to_fp16(float x) noexcept {
  const std::uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7e00;
  if (a >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (a < 0x38800000u) {                                       // below 2^-14: fixed point in units of 2^-24, rounded by the FPU's adder
    const float shifted = bits_float(a) + 0.5f;                // 0.5f has ulp 2^-24
    return std::uint16_t(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return std::uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

inline constexpr float kFp16Max = 65504.0f;

/// What a receiver decodes when `x` (finite) is sent as `wire`: rounded to nearest even and, for bf16 and fp16, cut to the largest finite
/// value, so that a payload never holds an infinity and what was cut stays with the sender.
THINWIRE_HD constexpr float wire_round(float x, DType wire) noexcept {
  if (wire == DType::bf16) {
    const std::uint16_t h = float_to_bf16(x);
    return bf16_to_float((h & 0x7fffu) >= 0x7f80u ? std::uint16_t((h & 0x8000u) | 0x7f7fu) : h);
  }
  if (wire == DType::fp16) {
    const float a = magnitude(x);
    if (a >= kFp16Max) return x < 0 ? -kFp16Max : kFp16Max;
    return fp16_to_float(float_to_fp16(x));
  }
  return x;
}

/// The smallest magnitude that does not round to zero on `wire`. Selection starts here, so zeros are never sent.
THINWIRE_HD constexpr float wire_floor(DType wire) noexcept {
  if (wire == DType::bf16) return bits_float(0x8001u);      // just above half of bf16's smallest denormal, whose tie goes to zero
  if (wire == DType::fp16) return bits_float(0x33000001u);  // just above 2^-25
  return bits_float(1u);
}

/// Element i of an array of `dtype`, as a float. @param base aligned to the dtype
template <DType dtype>
THINWIRE_HD inline float load_element(const void* base, std::size_t i) noexcept {
  if constexpr (dtype == DType::fp32) return static_cast<const float*>(base)[i];
  if constexpr (dtype == DType::bf16) return bf16_to_float(static_cast<const std::uint16_t*>(base)[i]);
  if constexpr (dtype == DType::fp16) return fp16_to_float(static_cast<const std::uint16_t*>(base)[i]);
}
THINWIRE_HD inline float load_element(const void* base, DType dtype, std::size_t i) noexcept {
  return dtype == DType::fp32   ? load_element<DType::fp32>(base, i)
         : dtype == DType::bf16 ? load_element<DType::bf16>(base, i)
                                : load_element<DType::fp16>(base, i);
}

/// A quiet NaN of each dtype, what every element of a non-finite bucket becomes.
THINWIRE_HD constexpr std::uint32_t nan_bits(DType dtype) noexcept {
  return dtype == DType::fp32 ? 0x7fc00000u : dtype == DType::bf16 ? 0x7fc0u : 0x7e00u;
}

}  // namespace thinwire
