#pragma once
// Elements of a recursion's state as they are stored.

#include <cstddef>
#include <cstdint>

#include "compressors/core/dtype.hpp"

namespace thinwire {

/// Pointer to fp32 elements, or to bf16 ones: two bytes each, of which arithmetic knows nothing. They are widened before, and rounded to
/// nearest even after, cut at the largest finite value, so that state is always finite.
class StateArray {
 public:
  constexpr StateArray() noexcept = default;
  constexpr StateArray(std::nullptr_t) noexcept {}
  THINWIRE_HD constexpr StateArray(float* fp32) noexcept : fp32_(fp32) {}
  THINWIRE_HD constexpr StateArray(std::uint16_t* bf16) noexcept : bf16_(bf16) {}

  THINWIRE_HD constexpr explicit operator bool() const noexcept { return fp32_ != nullptr || bf16_ != nullptr; }
  THINWIRE_HD constexpr bool narrow() const noexcept { return bf16_ != nullptr; }
  constexpr DType dtype() const noexcept { return narrow() ? DType::bf16 : DType::fp32; }
  THINWIRE_HD constexpr float* fp32() const noexcept { return fp32_; }  ///< null where narrow
  THINWIRE_HD constexpr std::uint16_t* bf16() const noexcept { return bf16_; }
  void* data() const noexcept { return narrow() ? static_cast<void*>(bf16_) : fp32_; }

  /// From element `first` on.
  THINWIRE_HD constexpr StateArray from(std::size_t first) const noexcept {
    StateArray out = *this;
    if (fp32_ != nullptr) out.fp32_ += first;
    if (bf16_ != nullptr) out.bf16_ += first;
    return out;
  }

  THINWIRE_HD constexpr float operator[](std::size_t i) const noexcept { return narrow() ? bf16_to_float(bf16_[i]) : fp32_[i]; }
  THINWIRE_HD constexpr void set(std::size_t i, float x) const noexcept {
    if (narrow()) {
      bf16_[i] = std::uint16_t(float_bits(wire_round(x, DType::bf16)) >> 16);
    } else {
      fp32_[i] = x;
    }
  }

  constexpr bool operator==(const StateArray&) const noexcept = default;

 private:
  float* fp32_ = nullptr;
  std::uint16_t* bf16_ = nullptr;
};

/// to[i] = from[i], and back.
void load_state(StateArray from, float* to, std::size_t count) noexcept;
void store_state(const float* from, StateArray to, std::size_t count) noexcept;
void clear_state(StateArray array, std::size_t count) noexcept;

/// Elements of state arrays are taken so many at a time where floats are needed of narrow ones: what is needed of several fits into L1.
inline constexpr std::size_t kStatePiece = 1024;

/// Up to kStatePiece elements of a state array as floats, wherever they lie: where they are, or widened here and written back at the end.
class StatePiece {
 public:
  StatePiece(StateArray array, std::size_t count) noexcept : array_(array), count_(count) {
    if (array.narrow()) load_state(array, widened_, count);
  }
  ~StatePiece() {
    if (array_.narrow() && stored_) store_state(widened_, array_, count_);
  }
  StatePiece(const StatePiece&) = delete;
  StatePiece& operator=(const StatePiece&) = delete;

  float* data() noexcept { return array_.narrow() ? widened_ : array_.fp32(); }  ///< null where there is no array
  /// Changes to a narrow array are dropped.
  void drop() noexcept { stored_ = false; }

 private:
  StateArray array_;
  std::size_t count_;
  bool stored_ = true;
  alignas(64) float widened_[kStatePiece];
};

}  // namespace thinwire
