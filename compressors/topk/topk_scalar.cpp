// The portable twin: one element at a time, the reference of the others.

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "compressors/core/recursion.hpp"
#include "compressors/core/rounding.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/topk/topk_kernels.hpp"

namespace thinwire::topk {
namespace {

template <Form form, DType dtype>
feedback::Estimated estimated_at(const Block& b, std::size_t i) noexcept {
  auto out = feedback::estimated_at<form, dtype>(b, i);
  if (feedback::is_control(form) && b.narrow) out.residual = wire_round(out.residual, DType::bf16);
  return out;
}

/// Writes what an element of a form with an estimate keeps.
template <Form form>
void keep(const Block& b, std::size_t i, const feedback::Estimated& element) noexcept {
  if constexpr (feedback::has_residual(form)) b.residual[i] = element.residual;
  if constexpr (feedback::is_smoothed(form)) b.average[i] = element.average;
}

template <Form form, DType dtype>
void estimate_range(const Block& b, std::uint32_t from, std::uint32_t to, Emitted& emitted) {
  for (std::uint32_t i = from; i < to; ++i) {
    if (!is_live(b.live, i)) continue;
    feedback::Estimated element = estimated_at<form, dtype>(b, i);
    if (!element.finite) emitted.flags |= kFlagNonfinite;
    if (magnitude(element.x) >= b.threshold) {
      ++emitted.hits;
      if (emitted.count < b.room) {
        float w = element.x;
        if (b.clear) w = b.grid ? feedback::to_grid(w, b.estimate[i]) : wire_round(w, b.wire);
        b.index[emitted.count] = std::uint16_t(i);
        b.value[emitted.count++] = w;
        if (b.clear) feedback::send(w, element.residual, b.estimate[i]);
      }
    }
    if (b.clear) keep<form>(b, i, element);
  }
}

/// Reads gradient and state once, writes state once; entries in index order. Bit-exact.
template <Form form, DType dtype>
void range(const Block& b, std::uint32_t from, std::uint32_t to, Emitted& emitted) {
  if constexpr (feedback::has_estimate(form)) return estimate_range<form, dtype>(b, from, to, emitted);
  for (std::uint32_t i = from; i < to; ++i) {
    if (!is_live(b.live, i)) continue;
    float g, x, u = 0, residual = 0;
    if constexpr (feedback::has_residual(form)) residual = b.residual[i];
    if constexpr (feedback::has_momentum(form)) u = b.momentum[i];
    if (!feedback::news(load_element<dtype>(b.grad, i) * b.factor, g)) emitted.flags |= kFlagNonfinite;
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
void advance(const Block& b) {
  for (std::uint32_t i = 0; i < b.count; ++i)
    if (is_live(b.live, i)) keep<form>(b, i, estimated_at<form, dtype>(b, i));
}

template <Form form, DType dtype>
float message_at(const Block& segment, std::size_t i) {
  return is_live(segment.live, i) ? estimated_at<form, dtype>(segment, i).x : 0.0f;
}

template <Form form, DType dtype>
void stream(const Block& block, Emitted& emitted) {
  range<form, dtype>(block, 0, block.count, emitted);
}

template <Form form, DType dtype>
std::uint32_t magnitude_at(const Block& s, std::size_t i) noexcept {
  if constexpr (feedback::has_estimate(form)) return float_bits(magnitude(message_at<form, dtype>(s, i)));
  if (!is_live(s.live, i)) return 0;
  float g, x, u = 0, residual = 0;
  if constexpr (feedback::has_residual(form)) residual = s.residual[i];
  if constexpr (feedback::has_momentum(form)) u = s.momentum[i];
  feedback::news(load_element<dtype>(s.grad, i) * s.factor, g);
  feedback::message<form>(g, s.rate, residual, u, x);
  return is_finite(x) ? float_bits(magnitude(x)) : 0;
}

template <Form form, DType dtype>
std::size_t sample(const Block& segment, std::uint64_t draw, std::uint32_t* magnitudes) {
  const std::size_t m = sample_size(segment.count);
  if (m == segment.count) {
    for (std::size_t i = 0; i < m; ++i) magnitudes[i] = magnitude_at<form, dtype>(segment, i);
    return m;
  }
  SampleGroups groups(segment.count, draw);
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
  const bool finite = store_scaled(tile, factor, dtype, out, count);
  std::fill_n(tile, count, 0.0f);
  return finite;
}

template <DType dtype>
std::uint32_t add_bitmap(const std::uint32_t* words, std::size_t count, const std::byte* values, std::uint32_t next, std::uint32_t,
                         float* target) {
  for (std::size_t first = 0; first < count; first += 32)
    for (std::uint32_t bits = words[first / 32]; bits != 0; bits &= bits - 1)
      target[first + std::size_t(std::countr_zero(bits))] += load_element<dtype>(values, next++);
  return next;
}

/// kernel.operator()<form, dtype>() for every form and gradient dtype.
template <class Kernel, class Make>
constexpr auto for_all(Make make) {
  std::array<std::array<Kernel, kDTypes>, feedback::kGradientForms> out{};
  const auto fill = [&]<std::size_t... form>(std::index_sequence<form...>) {
    ((out[form] = {make.template operator()<Form(form), DType::fp32>(), make.template operator()<Form(form), DType::bf16>(),
                   make.template operator()<Form(form), DType::fp16>()}),
     ...);
  };
  fill(std::make_index_sequence<feedback::kGradientForms>());
  return out;
}
constexpr auto kRanges = for_all<RangeKernel>([]<Form form, DType dtype>() -> RangeKernel { return range<form, dtype>; });
constexpr auto kStreams = for_all<StreamKernel>([]<Form form, DType dtype>() -> StreamKernel { return stream<form, dtype>; });
constexpr auto kSamples = for_all<SampleKernel>([]<Form form, DType dtype>() -> SampleKernel { return sample<form, dtype>; });
constexpr auto kAdvances = for_all<AdvanceKernel>([]<Form form, DType dtype>() -> AdvanceKernel {
  if constexpr (feedback::has_estimate(form)) return advance<form, dtype>;
  return nullptr;
});
constexpr auto kMessages = for_all<MessageKernel>([]<Form form, DType dtype>() -> MessageKernel {
  if constexpr (feedback::has_estimate(form)) return message_at<form, dtype>;
  return nullptr;
});
constexpr Kernels kScalar = {{kStreams, kStreams, kStreams},
                             kSamples,
                             {},
                             narrow,
                             finish,
                             {add_bitmap<DType::fp32>, add_bitmap<DType::bf16>, add_bitmap<DType::fp16>}};

}  // namespace

const Kernels& kernels_scalar() noexcept { return kScalar; }

RangeKernel range_kernel(Form form, DType grad) noexcept { return kRanges[std::size_t(form)][std::size_t(grad)]; }
AdvanceKernel advance_kernel(Form form, DType grad) noexcept { return kAdvances[std::size_t(form)][std::size_t(grad)]; }
MessageKernel message_kernel(Form form, DType grad) noexcept { return kMessages[std::size_t(form)][std::size_t(grad)]; }

}  // namespace thinwire::topk
