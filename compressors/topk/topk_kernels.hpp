#pragma once
// The kernels of top-k behind one table per ISA. All ISAs give the same bits; the portable one is the reference.

#include <array>
#include <cstddef>
#include <cstdint>

#include "compressors/core/dtype.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/feedback/form.hpp"
#include "compressors/topk/topk_math.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::topk {

using feedback::Form;

inline constexpr int kDTypes = 3;                 // gradients: fp32, bf16, fp16
inline constexpr std::size_t kStagingSlack = 64;  // entries that a left-pack may overwrite past the last one

/// A block of at most kBlock elements (the sampling kernels: a whole segment). Pointers are to its first element.
struct Block {
  const void* grad = nullptr;
  float* momentum = nullptr;           ///< u; forms with momentum
  float* residual = nullptr;           ///< e or v; null for forms without
  float* estimate = nullptr;           ///< h; forms with an estimate
  float* average = nullptr;            ///< the worker average; smoothed forms
  const std::uint8_t* live = nullptr;  ///< bit 0 of byte 0 is the first element; null: all live
  std::uint32_t count = 0;
  std::uint32_t room = 0;     ///< the first `room` hits are emitted; later ones are counted and stay in the residual
  float factor = 1;           ///< of the gradient
  float rate = 0;             ///< rho, m or eta
  float keep = 0, fresh = 1;  ///< smoothed forms: the shares of the worker average and of the gradient in it
  float threshold = 0;        ///< hit: |x| >= threshold, which is positive
  DType wire = DType::fp32;
  /// false: emit x itself, unrounded, and leave the state as if nothing was sent; forms with an estimate write none of it (AdvanceKernel).
  bool clear = true;
  bool mask = true;                ///< momentum factor masking
  bool narrow = false;             ///< control: the residual is rounded to bf16 before what is sent leaves it (Recursion::narrow)
  bool grid = false;               ///< forms with an estimate: Recursion::grid; the wire is fp32
  std::uint16_t* index = nullptr;  ///< staging of min(room, count) + kStagingSlack entries
  float* value = nullptr;
  std::uint32_t* bitmap = nullptr;  ///< where the hits are noted as bits too; may be null
};

struct Emitted {
  std::uint32_t count = 0;  ///< entries in the staging
  std::uint32_t hits = 0;   ///< elements at or above the threshold
  std::uint32_t flags = 0;  ///< kFlagNonfinite
  std::uint32_t noted = 0;  ///< the first `noted` elements, a multiple of 32, have their hits in the bitmap
};

/// The fused pass over a block: gradient and state in, state and entries (ascending) out. One read of gradient and state, one write of
/// state.
using StreamKernel = void (*)(const Block& block, Emitted& emitted);
/// Elements [from, to) of a block, one by one, continuing `emitted`: what vector kernels call for tails, masks, full rooms and non-finite
/// values.
using RangeKernel = void (*)(const Block& block, std::uint32_t from, std::uint32_t to, Emitted& emitted);
/// Forms with an estimate: what they keep if nothing is sent. With what `clear` = false emitted it makes the fused pass in two.
using AdvanceKernel = void (*)(const Block& block);
/// Forms with an estimate: the message of element i, from a state that is not advanced yet; 0 where nothing may be sent.
using MessageKernel = float (*)(const Block& segment, std::size_t i);
/// |x| bits of the sample of a segment; dead elements and messages that overflow count as 0. @returns how many: sample_size(count).
using SampleKernel = std::size_t (*)(const Block& segment, std::uint64_t draw, std::uint32_t* magnitudes);
/// out = factor × tile, rounded once to dtype; the tile is zero afterwards. @returns whether all of out is finite. `streaming`: past the
/// caches.
using FinishKernel = bool (*)(float* tile, std::size_t count, float factor, DType dtype, void* out, bool streaming);

/// target[i] += the next value, for every set bit i of `words`, of which `count` elements count; `next` is the first value's place, and
/// `capacity` values may be read. @returns the place after the last.
using AddBitmapKernel = std::uint32_t (*)(const std::uint32_t* words, std::size_t count, const std::byte* values, std::uint32_t next,
                                          std::uint32_t capacity, float* target);

/// Ways of finding the hits of a group, all with the same bits: a branch per group, a few offsets written without asking, and many.
inline constexpr int kTiers = 3;

struct Kernels {
  std::array<std::array<std::array<StreamKernel, kDTypes>, feedback::kGradientForms>, kTiers> stream;
  std::array<std::array<SampleKernel, kDTypes>, feedback::kGradientForms> sample;
  std::array<std::array<float, feedback::kGradientForms>, kTiers - 1>
      crossover;  ///< density of the previous block from which the next tier is faster (measured)
  Narrow narrow;
  FinishKernel finish;
  std::array<AddBitmapKernel, kDTypes> add_bitmap;  ///< by the wire's dtype
};

/// @throws Error{invalid_argument} if this CPU lacks the ISA.
const Kernels& kernels(Isa isa);

const Kernels& kernels_scalar() noexcept;
const Kernels& kernels_avx2() noexcept;
const Kernels& kernels_avx512() noexcept;
RangeKernel range_kernel(Form form, DType grad) noexcept;
AdvanceKernel advance_kernel(Form form, DType grad) noexcept;
MessageKernel message_kernel(Form form, DType grad) noexcept;

/// The groups of a sample one after the other, without a division each.
class SampleGroups {
 public:
  SampleGroups(std::size_t count, std::uint64_t draw) noexcept : strata_(count, draw) {}

  std::uint64_t taken() const noexcept { return strata_.taken; }
  /// First element of the next group.
  std::size_t next() noexcept {
    const std::uint64_t group = stratum_ + strata_.jitter(next_++);
    stratum_ += strata_.stride;
    carry_ += strata_.remainder;
    if (carry_ >= strata_.taken) {
      carry_ -= strata_.taken;
      ++stratum_;
    }
    return std::size_t(group) * kSampleGroup;
  }

 private:
  SampleStrata strata_;
  std::uint64_t next_ = 0, stratum_ = 0, carry_ = 0;
};

}  // namespace thinwire::topk
