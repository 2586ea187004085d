#pragma once
// What the CUDA kernels of top-k share: the recursion of one element, and sending an entry.

#include "compressors/core/cuda_device.cuh"
#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/topk/topk_cuda_kernels.hpp"
#include "compressors/topk/topk_math.hpp"

namespace thinwire::topk {

using namespace thinwire::cuda;

/// One element's step. @returns the message, or NaN where it is not finite and the state stays; `bad` is raised as on the CPU.
template <Form form>
__device__ inline float step_element(float scaled, float rate, float& residual, float& u, bool& bad) {
  float g, x, moved = u;
  if (!feedback::news(scaled, g)) bad = true;
  feedback::message<form>(g, rate, residual, moved, x);
  if (!is_finite(x)) {
    bad = true;
    return bits_float(0x7fc00000u);
  }
  residual = x;
  u = moved;
  return x;
}

/// What an element of a form with an estimate sends and keeps, from gradient and state as they lie in memory.
template <Form form>
__device__ inline feedback::Estimated estimated_at(const EncodeCall& call, const DeviceSegment& segment, float factor, std::size_t i) {
  float residual = 0, average = 0;
  if constexpr (feedback::has_residual(form)) residual = segment.residual[i];
  if constexpr (feedback::is_smoothed(form)) average = segment.average[i];
  const float eta = feedback::limited_eta(segment.eta, segment.eta_limit);
  return feedback::estimated<form>(load_element(call.grad, call.grad_dtype, segment.range.first + i) * factor, eta, call.keep, call.fresh,
                                   segment.estimate[i], residual, average);
}

__device__ inline std::uint32_t* words_at(std::byte* base, std::size_t at) { return reinterpret_cast<std::uint32_t*>(base + at); }
__device__ inline const std::uint32_t* words_at(const std::byte* base, std::size_t at) {
  return reinterpret_cast<const std::uint32_t*>(base + at);
}

/// Places a value, rounded, and leaves in the state what the wire cuts off. The index is the caller's.
__device__ inline void send_value(const EncodeCall& call, const DeviceSegment& segment, std::uint32_t place, std::size_t i, float x) {
  const float w = call.grid ? feedback::to_grid(x, segment.estimate[i]) : wire_round(x, call.wire_dtype);
  std::byte* values = call.wire + segment.value_at;
  if (call.wire_dtype == DType::fp32) {
    reinterpret_cast<float*>(values)[place] = w;
  } else {
    reinterpret_cast<std::uint16_t*>(values)[place] = call.wire_dtype == DType::bf16 ? float_to_bf16(w) : float_to_fp16(w);
  }
  float residual = 0;
  if (segment.estimate) {
    float estimate = segment.estimate[i];
    if (segment.residual) residual = segment.residual[i];
    feedback::send(w, residual, estimate);
    segment.estimate.set(i, estimate);
    if (segment.residual) segment.residual.set(i, residual);
    return;
  }
  feedback::leave(x, w, residual);
  if (segment.residual) segment.residual.set(i, residual);
  if (segment.momentum != nullptr && call.mask) segment.momentum[i] = 0;
}
/// The index of an entry where the form has one apart from block counts and bits.
__device__ inline void send_index(const EncodeCall& call, const DeviceSegment& segment, std::uint32_t place, std::size_t i) {
  std::byte* indices = call.wire + segment.index_at;
  if (IndexForm(segment.form) == IndexForm::u32) {
    reinterpret_cast<std::uint32_t*>(indices)[place] = std::uint32_t(i);
  } else if (IndexForm(segment.form) == IndexForm::u16) {
    reinterpret_cast<std::uint16_t*>(indices + 4 * blocks_of(segment.range.count))[place] = std::uint16_t(i % kBlock);
  }
}

/// Once per segment: how many entries it has sent.
__device__ inline void send_kept(const EncodeCall& call, std::uint32_t s, std::uint32_t kept) {
  words_at(call.wire, sizeof(wire::Header))[s] = kept;
  if (call.kept != nullptr) call.kept[s] = kept;
}

}  // namespace thinwire::topk
