#pragma once
// An independent reading of the 16-bit dtypes, for tests: roundings come from sorted tables of all representable values.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "compressors/core/dtype.hpp"

namespace oracle {

using thinwire::DType;

/// The value of 16 bits by the definition of the format: sign, exponent, mantissa.
inline double defined_value(std::uint16_t bits, DType dtype) {
  const int mantissa_bits = dtype == DType::bf16 ? 7 : 10, bias = dtype == DType::bf16 ? 127 : 15,
            exponents = dtype == DType::bf16 ? 255 : 31;
  const int exponent = (bits >> mantissa_bits) & exponents;
  const double mantissa = bits & ((1 << mantissa_bits) - 1), one = 1 << mantissa_bits;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == exponents) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa / one, 1 - bias);
  return sign * std::ldexp(1 + mantissa / one, exponent - bias);
}

struct HalfTable {
  std::vector<double> values;      ///< by bits
  std::vector<double> magnitudes;  ///< the finite ones in rising order; index = bits, since the formats sort like integers
  explicit HalfTable(DType dtype) {
    for (std::uint32_t bits = 0; bits < 65536; ++bits) values.push_back(defined_value(std::uint16_t(bits), dtype));
    for (std::uint32_t bits = 0; std::isfinite(values[bits]); ++bits) magnitudes.push_back(values[bits]);
  }
};
inline const HalfTable& half_table(DType dtype) {
  static const HalfTable bf16(DType::bf16), fp16(DType::fp16);
  return dtype == DType::bf16 ? bf16 : fp16;
}
inline double half_value(std::uint16_t bits, DType dtype) { return half_table(dtype).values[bits]; }

/// Bits of the nearest value, ties to the even pattern; what rounds past the largest gives infinity, or the largest where `saturate`.
inline std::uint16_t nearest_bits(double x, DType dtype, bool saturate) {
  const auto& table = half_table(dtype).magnitudes;
  const double a = std::fabs(x);
  // Where a bf16 number lies is a guess away, which counts where the table agrees.
  const float near = float(a);
  std::uint32_t pattern;
  std::memcpy(&pattern, &near, 4);
  std::size_t up = pattern >> 16;
  if (dtype == DType::bf16 && up + 1 < table.size() && table[up] <= a && a <= table[up + 1]) {
    if (table[up] != a) ++up;
  } else {
    up = std::size_t(std::lower_bound(table.begin(), table.end(), a) - table.begin());
  }
  std::size_t bits;
  if (up == table.size()) {
    const double step = table[up - 1] - table[up - 2];
    bits = saturate || a < table[up - 1] + step / 2 ? up - 1 : up;  // the pattern after the largest is infinity
  } else if (table[up] == a || up == 0) {
    bits = up;
  } else {
    const double below = a - table[up - 1], above = table[up] - a;
    bits = below < above ? up - 1 : above < below ? up : up % 2 == 0 ? up : up - 1;
  }
  return std::uint16_t(bits | (std::signbit(x) ? 0x8000 : 0));
}

/// What a state array that is `narrow` holds of x.
inline float stored_value(float x, bool narrow) { return narrow ? float(half_value(nearest_bits(x, DType::bf16, true), DType::bf16)) : x; }
/// What is sent of a message x for an estimate h on bf16's grid.
inline float grid_value(float x, float h) {
  const float sum = h + x;
  return stored_value(std::isfinite(sum) ? sum : std::copysign(std::numeric_limits<float>::max(), sum), true) - h;
}

/// What arrives of a finite x.
inline float sent_value(float x, DType wire) { return wire == DType::fp32 ? x : float(half_value(nearest_bits(x, wire, true), wire)); }

/// A gradient element in its dtype's own bytes, and back.
inline std::vector<std::byte> to_bytes(const std::vector<float>& x, DType dtype) {
  std::vector<std::byte> out(x.size() * thinwire::size_of(dtype));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (dtype == DType::fp32) {
      std::memcpy(&out[4 * i], &x[i], 4);
    } else {
      std::uint16_t bits = std::isnan(x[i])   ? (dtype == DType::bf16 ? 0x7fc0 : 0x7e00)
                           : std::isinf(x[i]) ? (dtype == DType::bf16 ? 0x7f80 : 0x7c00)
                                              : nearest_bits(x[i], dtype, false);
      if (std::isinf(x[i]) && x[i] < 0) bits |= 0x8000;
      std::memcpy(&out[2 * i], &bits, 2);
    }
  }
  return out;
}
inline float element(const std::vector<std::byte>& bytes, std::size_t i, DType dtype) {
  if (dtype == DType::fp32) {
    float x;
    std::memcpy(&x, &bytes[4 * i], 4);
    return x;
  }
  std::uint16_t h;
  std::memcpy(&h, &bytes[2 * i], 2);
  return float(half_value(h, dtype));
}

}  // namespace oracle
