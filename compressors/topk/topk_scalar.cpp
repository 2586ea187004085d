// The portable twin: one element at a time, the reference of the others.

#include <bit>
#include <cstring>

#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/topk/topk_kernels.hpp"

namespace thinwire::topk {
namespace {

/// Reads gradient and state once, writes state once; entries in index order. Bit-exact.
template <Form form, DType dtype>
void range(const Block& b, std::uint32_t from, std::uint32_t to, Emitted& emitted) {
  for (std::uint32_t i = from; i < to; ++i) {
    if (!is_live(b.live, i)) continue;
    float g, x, u = 0, residual = 0;
    if constexpr (feedback::has_residual(form)) residual = b.residual[i];
    if constexpr (feedback::has_momentum(form)) u = b.momentum[i];
    if (!feedback::news(load_grad<dtype>(b.grad, i) * b.factor, g)) emitted.flags |= kFlagNonfinite;
    feedback::message<form>(g, b.rate, residual, u, x);
    if (!is_finite(x)) {  // an accumulator overflowed: this element sits the step out
      emitted.flags |= kFlagNonfinite;
      continue;
    }
    residual = x;
    if (magnitude(x) >= b.threshold) {
      ++emitted.hits;
      if (emitted.count < b.room) {
        const float w = b.clear ? wire_round(x, b.wire) : x;
        b.index[emitted.count] = std::uint16_t(i);
        b.value[emitted.count++] = w;
        if (b.clear) {
          feedback::leave(x, w, residual);
          if (b.mask) u = 0;
        }
      }
    }
    if constexpr (feedback::has_residual(form)) b.residual[i] = residual;
    if constexpr (feedback::has_momentum(form)) b.momentum[i] = u;
  }
}

template <Form form, DType dtype>
void stream(const Block& block, Emitted& emitted) {
  range<form, dtype>(block, 0, block.count, emitted);
}

template <Form form, DType dtype>
std::uint32_t magnitude_at(const Block& s, std::size_t i) noexcept {
  if (!is_live(s.live, i)) return 0;
  float g, x, u = 0, residual = 0;
  if constexpr (feedback::has_residual(form)) residual = s.residual[i];
  if constexpr (feedback::has_momentum(form)) u = s.momentum[i];
  feedback::news(load_grad<dtype>(s.grad, i) * s.factor, g);
  feedback::message<form>(g, s.rate, residual, u, x);
  return is_finite(x) ? float_bits(magnitude(x)) : 0;
}

template <Form form, DType dtype>
std::size_t sample(const Block& segment, std::uint64_t step, std::uint32_t* magnitudes) {
  const std::size_t m = sample_size(segment.count);
  if (m == segment.count) {
    for (std::size_t i = 0; i < m; ++i) magnitudes[i] = magnitude_at<form, dtype>(segment, i);
    return m;
  }
  SampleGroups groups(segment.count, step);
  for (std::uint64_t j = 0; j < groups.taken(); ++j) {
    const std::size_t first = groups.next();
    for (std::size_t i = 0; i < kSampleGroup; ++i) magnitudes[j * kSampleGroup + i] = magnitude_at<form, dtype>(segment, first + i);
  }
  return m;
}

void narrow(const float* values, std::size_t count, DType wire, std::byte* out) {
  if (wire == DType::fp32) {
    if (count != 0) std::memcpy(out, values, 4 * count);
    return;
  }
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  if (wire == DType::bf16) {
    for (std::size_t i = 0; i < count; ++i) half[i] = float_to_bf16(values[i]);
  } else {
    for (std::size_t i = 0; i < count; ++i) half[i] = float_to_fp16(values[i]);
  }
}

bool finish(float* tile, std::size_t count, float factor, DType dtype, void* out, bool) {
  bool finite = true;
  auto* half = static_cast<std::uint16_t*>(out);
  for (std::size_t i = 0; i < count; ++i) {
    const float mean = tile[i] * factor;
    tile[i] = 0;
    if (dtype == DType::fp32) {
      finite &= is_finite(mean);
      static_cast<float*>(out)[i] = mean;
    } else if (dtype == DType::bf16) {
      half[i] = float_to_bf16(mean);
      finite &= (half[i] & 0x7f80u) != 0x7f80u;
    } else {
      half[i] = float_to_fp16(mean);
      finite &= (half[i] & 0x7c00u) != 0x7c00u;
    }
  }
  return finite;
}

template <DType dtype>
std::uint32_t add_bitmap(const std::uint32_t* words, std::size_t count, const std::byte* values, std::uint32_t next, std::uint32_t,
                         float* target) {
  for (std::size_t first = 0; first < count; first += 32)
    for (std::uint32_t bits = words[first / 32]; bits != 0; bits &= bits - 1)
      target[first + std::size_t(std::countr_zero(bits))] += load_grad<dtype>(values, next++);
  return next;
}

template <Form form>
constexpr std::array<StreamKernel, kDTypes> kStreams = {stream<form, DType::fp32>, stream<form, DType::bf16>, stream<form, DType::fp16>};
template <Form form>
constexpr std::array<RangeKernel, kDTypes> kRanges = {range<form, DType::fp32>, range<form, DType::bf16>, range<form, DType::fp16>};
template <Form form>
constexpr std::array<SampleKernel, kDTypes> kSamples = {sample<form, DType::fp32>, sample<form, DType::bf16>, sample<form, DType::fp16>};

constexpr std::array<std::array<StreamKernel, kDTypes>, feedback::kGradientForms> kAllStreams = {
    kStreams<Form::none>, kStreams<Form::error_feedback>, kStreams<Form::momentum>, kStreams<Form::nesterov>};
constexpr std::array<std::array<RangeKernel, kDTypes>, feedback::kGradientForms> kAllRanges = {
    kRanges<Form::none>, kRanges<Form::error_feedback>, kRanges<Form::momentum>, kRanges<Form::nesterov>};
constexpr Kernels kScalar = {{kAllStreams, kAllStreams, kAllStreams},
                             {kSamples<Form::none>, kSamples<Form::error_feedback>, kSamples<Form::momentum>, kSamples<Form::nesterov>},
                             {},
                             narrow,
                             finish,
                             {add_bitmap<DType::fp32>, add_bitmap<DType::bf16>, add_bitmap<DType::fp16>}};

}  // namespace

const Kernels& kernels_scalar() noexcept { return kScalar; }

RangeKernel range_kernel(Form form, DType grad) noexcept { return kAllRanges[std::size_t(form)][std::size_t(grad)]; }

}  // namespace thinwire::topk
