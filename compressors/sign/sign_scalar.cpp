// The portable twin: one element at a time, the reference of the others.

#include <algorithm>

#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/sign/sign_kernels.hpp"
#include "compressors/sign/sign_math.hpp"

namespace thinwire::sign {
namespace {

template <DType dtype>
float load_grad(const void* grad, std::size_t i) noexcept {
  if constexpr (dtype == DType::fp32) return static_cast<const float*>(grad)[i];
  if constexpr (dtype == DType::bf16) return bf16_to_float(static_cast<const std::uint16_t*>(grad)[i]);
  if constexpr (dtype == DType::fp16) return fp16_to_float(static_cast<const std::uint16_t*>(grad)[i]);
}

template <Scale scale, Form form, DType dtype>
std::uint32_t range(const Chunk& c, std::size_t from, std::size_t to, float* partial, std::uint8_t* bits) {
  std::uint32_t flags = 0;
  for (std::size_t i = from; i < to; ++i) {
    if (i % 8 == 0) bits[i / 8] = 0;
    if (!is_live(c.live, i)) continue;
    float m = 0, residual = 0;
    if constexpr (feedback::is_averaged(form)) m = c.momentum[i];
    if constexpr (feedback::has_residual(form)) residual = c.residual[i];
    bool finite = true;
    const float x = message_of<form>(load_grad<dtype>(c.grad, i) * c.factor, c.rate, c.beta, m, residual, finite);
    if (!finite) flags = kFlagNonfinite;
    if constexpr (feedback::has_residual(form)) c.residual[i] = x;
    partial[i % kPartials] += weight<scale>(magnitude(x));
    bits[i / 8] |= std::uint8_t(bit_of(x)) << (i % 8);
  }
  return flags;
}

template <Scale scale, Form form, DType dtype>
std::uint32_t encode(const Chunk& chunk, float* partial, std::uint8_t* bits) {
  return range<scale, form, dtype>(chunk, 0, chunk.count, partial, bits);
}

void leave(float* residual, const std::uint8_t* live, std::size_t count, float scale) {
  for (std::size_t i = 0; i < count; ++i)
    if (is_live(live, i)) feedback::leave(residual[i], value_of(bit_of(residual[i]), scale), residual[i]);
}

template <DType dtype>
bool decode(const Peers& peers, std::size_t count, float factor, void* out, bool) {
  return decode_range(peers, 0, count, factor, dtype, out);
}

template <Scale scale, Form form>
constexpr std::array<RangeKernel, kDTypes> kFormRanges = {range<scale, form, DType::fp32>, range<scale, form, DType::bf16>,
                                                          range<scale, form, DType::fp16>};
template <Scale scale>
constexpr std::array<std::array<RangeKernel, kDTypes>, feedback::kForms> kScaleRanges = {
    kFormRanges<scale, Form::none>,     kFormRanges<scale, Form::error_feedback>,   {}, {},
    kFormRanges<scale, Form::averaged>, kFormRanges<scale, Form::averaged_feedback>};
constexpr std::array<std::array<std::array<RangeKernel, kDTypes>, feedback::kForms>, kScales> kRanges = {kScaleRanges<Scale::l1>,
                                                                                                         kScaleRanges<Scale::l2>};
template <Scale scale, Form form>
constexpr std::array<EncodeKernel, kDTypes> kFormEncoders = {encode<scale, form, DType::fp32>, encode<scale, form, DType::bf16>,
                                                             encode<scale, form, DType::fp16>};
template <Scale scale>
constexpr std::array<std::array<EncodeKernel, kDTypes>, feedback::kForms> kScaleEncoders = {
    kFormEncoders<scale, Form::none>,     kFormEncoders<scale, Form::error_feedback>,   {}, {},
    kFormEncoders<scale, Form::averaged>, kFormEncoders<scale, Form::averaged_feedback>};

constexpr Kernels kScalar = {
    {kScaleEncoders<Scale::l1>, kScaleEncoders<Scale::l2>}, leave, [] {}, {decode<DType::fp32>, decode<DType::bf16>, decode<DType::fp16>}};

}  // namespace

const Kernels& kernels_scalar() noexcept { return kScalar; }

RangeKernel range_kernel(Scale scale, Form form, DType grad) noexcept {
  return kRanges[std::size_t(scale)][std::size_t(form)][std::size_t(grad)];
}

bool decode_range(const Peers& peers, std::size_t from, std::size_t to, float factor, DType dtype, void* out) {
  bool finite = true;
  auto* half = static_cast<std::uint16_t*>(out);
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

}  // namespace thinwire::sign
