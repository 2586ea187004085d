#pragma once
// The kernels of the sign codec behind one table per ISA. All ISAs give the same bits; the portable one is the reference.

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "compressors/core/block_sum.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/feedback/form.hpp"
#include "compressors/sign/sign.hpp"

namespace thinwire::sign {

using feedback::Form;
using Scale = SignOptions::Scale;

inline constexpr int kDTypes = 3, kScales = 2;
inline constexpr std::size_t kOutputStreams = std::size_t(1) << 20;  ///< outputs of so many bytes are written past the caches

/// At most kSumBlock elements. Pointers are to the first of them.
struct Chunk {
  const void* grad = nullptr;
  const float* momentum = nullptr;     ///< m; averaged forms
  float* residual = nullptr;           ///< e; null for forms without
  float* estimate = nullptr;           ///< h; forms with an estimate
  float* average = nullptr;            ///< the worker average; smoothed forms
  const std::uint8_t* live = nullptr;  ///< Segment::live
  std::size_t count = 0;
  float factor = 1;           ///< of the gradient
  float rate = 0;             ///< rho or eta
  float beta = 0;             ///< beta1
  float keep = 0, fresh = 1;  ///< smoothed forms: the shares of the worker average and of the gradient in it
};

/// Messages and their bits: the residual becomes the message x of live elements (dead ones keep theirs; forms with an estimate write no
/// state yet), bit i % 8 of bits[i / 8] is
/// bit_of(x) of live elements and 0 of dead ones, the elements' weights go to `partial` (block_sum.hpp, i counted from the chunk's start).
/// Reads gradient, momentum and residual once, writes the residual once. @returns flags.
using EncodeKernel = std::uint32_t (*)(const Chunk& chunk, float* partial, std::uint8_t* bits);
/// Elements [from, to) of a chunk one by one; `from` is a multiple of 8. What vector kernels call for tails and non-finite values.
using RangeKernel = std::uint32_t (*)(const Chunk& chunk, std::size_t from, std::size_t to, float* partial, std::uint8_t* bits);
/// The residual of live elements becomes x − value_of(bit_of(x), scale), where x is what it holds.
using LeaveKernel = void (*)(float* residual, const std::uint8_t* live, std::size_t count, float scale);
/// Forms with an estimate, after EncodeKernel: what live elements keep now that value_of(bit, scale) was sent. Reads gradient and state
/// again, which are in cache for blocks that are, and writes the state.
using CommitKernel = void (*)(const Chunk& chunk, const std::uint8_t* bits, float scale);
/// The same for elements [from, to), one by one; `from` is a multiple of 8.
using CommitRange = void (*)(const Chunk& chunk, std::size_t from, std::size_t to, const std::uint8_t* bits, float scale);

/// The bits of several ranks over the same elements, one scale each.
struct Peers {
  const std::uint8_t* const* bits = nullptr;  ///< one pointer per rank
  std::size_t offset = 0;                     ///< bytes from each of them on
  const float* scales = nullptr;              ///< one per rank
  std::size_t count = 0;                      ///< ranks, at least 1
  const std::uint8_t* live = nullptr;
};
/// out[i] = factor × sum of the ranks' values, neighbouring pairs first: ((v0 + v1) + (v2 + v3)) + …, rounded once to `dtype`; 0 where
/// dead. Reads the bits once, writes out once. @returns whether all of out is finite. `streaming`: past the caches.
using DecodeKernel = bool (*)(const Peers& peers, std::size_t count, float factor, void* out, bool streaming);
/// The same for elements [from, to), one by one; `from` is a multiple of 8.
using DecodeRange = bool (*)(const Peers& peers, std::size_t from, std::size_t to, float factor, DType dtype, void* out);

struct Kernels {
  std::array<std::array<std::array<EncodeKernel, kDTypes>, feedback::kForms>, kScales> encode;  ///< null for forms of momentum correction
  LeaveKernel leave;
  std::array<std::array<CommitKernel, kDTypes>, feedback::kForms> commit;  ///< null for forms without an estimate
  void (*fence)();                           ///< after the last decode past the caches: other threads see it all
  std::array<DecodeKernel, kDTypes> decode;  ///< by out's dtype
};

/// Forms that the sign codec has kernels for.
constexpr bool is_known(Form form) noexcept { return !feedback::has_momentum(form); }

/// make.operator()<form, dtype>() for every gradient dtype and form for which `wanted`; null elsewhere.
template <class Kernel, bool (*wanted)(Form), class Make>
constexpr auto for_forms(Make make) {
  std::array<std::array<Kernel, kDTypes>, feedback::kForms> out{};
  const auto one = [&]<std::size_t f>() {
    if constexpr (wanted(Form(f)))
      out[f] = {make.template operator()<Form(f), DType::fp32>(), make.template operator()<Form(f), DType::bf16>(),
                make.template operator()<Form(f), DType::fp16>()};
  };
  [&]<std::size_t... f>(std::index_sequence<f...>) { (one.template operator()<f>(), ...); }
  (std::make_index_sequence<feedback::kForms>());
  return out;
}
template <class Kernel, class Make>
constexpr auto for_estimates(Make make) {
  return for_forms<Kernel, feedback::has_estimate>(make);
}
/// make.operator()<scale, form, dtype>() for every form that the codec knows.
template <class Kernel, class Make>
constexpr auto for_all_scales(Make make) {
  const auto with = [&]<Scale scale>() {
    return for_forms<Kernel, is_known>([&]<Form form, DType dtype>() { return make.template operator()<scale, form, dtype>(); });
  };
  return std::array{with.template operator()<Scale::l1>(), with.template operator()<Scale::l2>()};
}

/// @throws Error{invalid_argument} if this CPU lacks the ISA.
const Kernels& kernels(Isa isa);

const Kernels& kernels_scalar() noexcept;
const Kernels& kernels_avx2() noexcept;
const Kernels& kernels_avx512() noexcept;
RangeKernel range_kernel(Scale scale, Form form, DType grad) noexcept;
CommitRange commit_range(Form form, DType grad) noexcept;
bool decode_range(const Peers& peers, std::size_t from, std::size_t to, float factor, DType dtype, void* out);

}  // namespace thinwire::sign
