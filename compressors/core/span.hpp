#pragma once
// Spans that cross virtual seams: they carry place and dtype at run time. Inside a codec family places are types.

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "compressors/core/dtype.hpp"

namespace thinwire {

/// The next multiple of `to`.
constexpr std::size_t round_up(std::size_t x, std::size_t to) noexcept { return (x + to - 1) / to * to; }

enum class Place : std::uint8_t { host, cuda };

/// A view of `size` bytes holding elements of `dtype`, on `place` (and `device`, when that is a GPU). Never owns.
template <class Byte>
struct BasicBytes {
  Byte* data = nullptr;
  std::size_t size = 0;  ///< bytes
  DType dtype = DType::u8;
  Place place = Place::host;
  int device = 0;

  std::size_t count() const noexcept { return size / size_of(dtype); }  ///< elements
  bool empty() const noexcept { return size == 0; }

  template <class T>
  auto* as() const noexcept {
    return reinterpret_cast<std::conditional_t<std::is_const_v<Byte>, const T, T>*>(data);
  }
  /// Bytes [first, first + bytes), same dtype and place.
  BasicBytes sub(std::size_t first, std::size_t bytes) const noexcept { return {data + first, bytes, dtype, place, device}; }

  operator BasicBytes<const std::byte>() const noexcept requires(!std::is_const_v<Byte>) { return {data, size, dtype, place, device}; }
};

using Bytes = BasicBytes<std::byte>;
using ConstBytes = BasicBytes<const std::byte>;

/// A host view of `count` elements.
template <class T>
requires(!std::is_const_v<T>) Bytes host_bytes(T* data, std::size_t count, DType dtype)
noexcept { return {reinterpret_cast<std::byte*>(data), count * size_of(dtype), dtype, Place::host, 0}; }
template <class T>
ConstBytes host_bytes(const T* data, std::size_t count, DType dtype) noexcept {
  return {reinterpret_cast<const std::byte*>(data), count * size_of(dtype), dtype, Place::host, 0};
}
inline Bytes host_bytes(float* data, std::size_t count) noexcept { return host_bytes(data, count, DType::fp32); }
inline ConstBytes host_bytes(const float* data, std::size_t count) noexcept { return host_bytes(data, count, DType::fp32); }

}  // namespace thinwire
