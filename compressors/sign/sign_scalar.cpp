// The portable twin: one element at a time, the reference of the others.

#include <algorithm>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/rounding.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/sign/sign_kernels.hpp"
#include "compressors/sign/sign_math.hpp"

namespace thinwire::sign {
namespace {

template <Scale scale, Form form, DType dtype>
std::uint32_t range(const Chunk& c, std::size_t from, std::size_t to, float* partial, std::uint8_t* bits) {
  std::uint32_t flags = 0;
  for (std::size_t i = from; i < to; ++i) {
    if (i % 8 == 0) bits[i / 8] = 0;
    if (!is_live(c.live, i)) continue;
    bool finite = true;
    float x;
    if constexpr (feedback::has_estimate(form)) {
      const feedback::Estimated element = feedback::estimated_at<form, dtype>(c, i);
      x = element.x;
      finite = element.finite;
    } else {
      float m = 0, residual = 0;
      if constexpr (feedback::is_averaged(form)) m = c.momentum[i];
      if constexpr (feedback::has_residual(form)) residual = c.residual[i];
      x = message_of<form>(load_element<dtype>(c.grad, i) * c.factor, c.rate, c.beta, m, residual, finite);
      if constexpr (feedback::has_residual(form)) c.residual[i] = x;
    }
    if (!finite) flags = kFlagNonfinite;
    partial[i % kPartials] += weight<scale>(magnitude(x));
    bits[i / 8] |= std::uint8_t(bit_of(x)) << (i % 8);
  }
  return flags;
}

template <Scale scale, Form form, DType dtype>
std::uint32_t encode(const Chunk& chunk, float* partial, std::uint8_t* bits) {
  return range<scale, form, dtype>(chunk, 0, chunk.count, partial, bits);
}

template <Form form, DType dtype>
void commit_elements(const Chunk& c, std::size_t from, std::size_t to, const std::uint8_t* bits, float scale) {
  for (std::size_t i = from; i < to; ++i) {
    if (!is_live(c.live, i)) continue;
    feedback::Estimated element = feedback::estimated_at<form, dtype>(c, i);
    feedback::send(value_of(((bits[i / 8] >> (i % 8)) & 1u) != 0, scale), element.residual, c.estimate[i]);
    if constexpr (feedback::has_residual(form)) c.residual[i] = element.residual;
    if constexpr (feedback::is_smoothed(form)) c.average[i] = element.average;
  }
}

template <Form form, DType dtype>
void commit(const Chunk& chunk, const std::uint8_t* bits, float scale) {
  commit_elements<form, dtype>(chunk, 0, chunk.count, bits, scale);
}

void leave(float* residual, const std::uint8_t* live, std::size_t count, float scale) {
  for (std::size_t i = 0; i < count; ++i)
    if (is_live(live, i)) feedback::leave(residual[i], value_of(bit_of(residual[i]), scale), residual[i]);
}

template <DType dtype>
bool decode(const Peers& peers, std::size_t count, float factor, void* out, bool) {
  return decode_range(peers, 0, count, factor, dtype, out);
}

constexpr auto kRanges =
    for_all_scales<RangeKernel>([]<Scale scale, Form form, DType dtype>() -> RangeKernel { return range<scale, form, dtype>; });
constexpr auto kCommits = for_estimates<CommitRange>([]<Form form, DType dtype>() -> CommitRange { return commit_elements<form, dtype>; });
constexpr Kernels kScalar = {
    for_all_scales<EncodeKernel>([]<Scale scale, Form form, DType dtype>() -> EncodeKernel { return encode<scale, form, dtype>; }),
    leave,
    for_estimates<CommitKernel>([]<Form form, DType dtype>() -> CommitKernel { return commit<form, dtype>; }),
    [] {},
    {decode<DType::fp32>, decode<DType::bf16>, decode<DType::fp16>}};

}  // namespace

const Kernels& kernels_scalar() noexcept { return kScalar; }

RangeKernel range_kernel(Scale scale, Form form, DType grad) noexcept {
  return kRanges[std::size_t(scale)][std::size_t(form)][std::size_t(grad)];
}

CommitRange commit_range(Form form, DType grad) noexcept { return kCommits[std::size_t(form)][std::size_t(grad)]; }

bool decode_range(const Peers& peers, std::size_t from, std::size_t to, float factor, DType dtype, void* out) {
  bool finite = true;
  for (std::size_t i = from; i < to; ++i) {
    float mean = 0;
    if (is_live(peers.live, i)) {
      const auto value = [&](std::size_t r) {
        return value_of(((peers.bits[r][peers.offset + i / 8] >> (i % 8)) & 1u) != 0, peers.scales[r]);
      };
      float sum = peers.count > 1 ? value(0) + value(1) : value(0);
      for (std::size_t r = 2; r < peers.count; r += 2) sum += r + 1 < peers.count ? value(r) + value(r + 1) : value(r);
      mean = sum * factor;
    }
    finite &= store_scaled(&mean, 1.0f, dtype, static_cast<std::byte*>(out) + i * size_of(dtype), 1);
  }
  return finite;
}

}  // namespace thinwire::sign
