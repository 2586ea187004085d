#pragma once
// A second reader of top-k payloads, written from docs/wire_format.md, for tests that must know what each rank really sent. Shares no code
// with the codec.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "compressors/core/dtype.hpp"

namespace thinwire::test {

struct PayloadForm {
  DType wire = DType::fp32;
  std::string index = "u32";  ///< u32, u16 or bitmap; auto is not for here
  bool exact = true;
  double density = 0.1;
};

/// Entries of each segment in index order; `counts`: elements of each segment.
inline std::vector<std::vector<std::pair<std::size_t, float>>> read_payload(const std::vector<std::byte>& payload,
                                                                            const std::vector<std::size_t>& counts,
                                                                            const PayloadForm& form) {
  const auto load16 = [&](std::size_t at) {
    std::uint16_t x;
    std::memcpy(&x, payload.data() + at, 2);
    return x;
  };
  const auto load32 = [&](std::size_t at) {
    std::uint32_t x;
    std::memcpy(&x, payload.data() + at, 4);
    return x;
  };
  const auto up4 = [](std::size_t x) { return (x + 3) / 4 * 4; };
  const std::size_t size = form.wire == DType::fp32 ? 4 : 2;
  std::vector<std::vector<std::pair<std::size_t, float>>> out;
  std::size_t at = 64 + 4 * counts.size();
  for (std::size_t s = 0; s < counts.size(); ++s) {
    const std::size_t n = counts[s], kept = load32(64 + 4 * s);
    const auto k = std::size_t(std::max(1.0, std::ceil(form.density * double(n) - 1e-9)));
    const std::size_t capacity = form.exact ? k : std::min(n, k + (k + 3) / 4), blocks = (n + 65535) / 65536;
    std::vector<std::size_t> index;
    std::size_t index_bytes = 0;
    if (form.index == "u32") {
      index_bytes = 4 * capacity;
      for (std::size_t i = 0; i < kept; ++i) index.push_back(load32(at + 4 * i));
    } else if (form.index == "u16") {
      index_bytes = 4 * blocks + up4(2 * capacity);
      for (std::size_t b = 0; b < blocks; ++b)
        for (std::size_t i = 0, m = load32(at + 4 * b); i < m; ++i) index.push_back(b * 65536 + load16(at + 4 * blocks + 2 * index.size()));
    } else {
      index_bytes = 4 * ((n + 31) / 32);
      for (std::size_t i = 0; i < n; ++i)
        if ((load32(at + 4 * (i / 32)) >> (i % 32) & 1) != 0) index.push_back(i);
    }
    at += index_bytes;
    auto& entries = out.emplace_back();
    for (std::size_t i = 0; i < index.size(); ++i) {
      float value = 0;
      if (form.wire == DType::fp32) {
        std::memcpy(&value, payload.data() + at + 4 * i, 4);
      } else if (form.wire == DType::bf16) {
        const std::uint32_t bits = std::uint32_t(load16(at + 2 * i)) << 16;
        std::memcpy(&value, &bits, 4);
      } else {
        const std::uint16_t h = load16(at + 2 * i);
        const int exponent = h >> 10 & 31, mantissa = h & 1023;
        value = std::ldexp(float(exponent == 0 ? mantissa : mantissa + 1024), (exponent == 0 ? 1 : exponent) - 25);
        if ((h & 0x8000) != 0) value = -value;
      }
      entries.emplace_back(index[i], value);
    }
    at += up4(size * capacity);
  }
  return out;
}

}  // namespace thinwire::test
