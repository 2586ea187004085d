#pragma once
// The sum of the host transports: element by element, rounded to the dtype after each addition.

#include <cstddef>
#include <cstring>

#include "compressors/core/dtype.hpp"

namespace thinwire::detail {

template <class T, class Add>
void add_as(std::byte* sum, const std::byte* addend, std::size_t bytes, Add add) {
  for (std::size_t at = 0; at < bytes; at += sizeof(T)) {  // memcpy: a bucket's view may start anywhere
    T a, b;
    std::memcpy(&a, sum + at, sizeof(T));
    std::memcpy(&b, addend + at, sizeof(T));
    a = add(a, b);
    std::memcpy(sum + at, &a, sizeof(T));
  }
}

/// sum[i] = round(sum[i] + addend[i]) in `dtype` (fp32, bf16, fp16). `bytes` is a whole number of elements; no overlap, any alignment.
/// Adding the ranks in rank order on ONE rank and sending the result gives all ranks the same bits, also where two NaNs meet.
inline void add_elements(std::byte* sum, const std::byte* addend, std::size_t bytes, DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return add_as<float>(sum, addend, bytes, [](float a, float b) { return a + b; });
    case DType::bf16:
      return add_as<std::uint16_t>(sum, addend, bytes,
                                   [](std::uint16_t a, std::uint16_t b) { return float_to_bf16(bf16_to_float(a) + bf16_to_float(b)); });
    case DType::fp16:
      return add_as<std::uint16_t>(sum, addend, bytes,
                                   [](std::uint16_t a, std::uint16_t b) { return float_to_fp16(fp16_to_float(a) + fp16_to_float(b)); });
    case DType::u8:
      return;  // refused by Communicator::all_reduce
  }
}

/// First byte of part r of `bytes` cut into `world` parts of whole elements; part r ends where r + 1 begins.
inline std::size_t part_begin(std::size_t bytes, DType dtype, int r, int world) noexcept {
  const std::size_t count = bytes / size_of(dtype), each = count / std::size_t(world), more = count % std::size_t(world),
                    i = std::size_t(r);
  return (each * i + (i < more ? i : more)) * size_of(dtype);
}

}  // namespace thinwire::detail
