// Norms, clip factors and the dense step on a GPU.

#include <limits>

#include "compressors/core/device_ranges.cuh"
#include "compressors/core/device_recursion.hpp"
#include "compressors/core/dtype.hpp"
#include "compressors/core/error.hpp"
#include "compressors/feedback/clip.hpp"
#include "compressors/feedback/feedback_math.hpp"
#include "compressors/feedback/form.hpp"

namespace thinwire {
namespace {

using namespace thinwire::cuda;
using namespace thinwire::feedback;

// The order of the sums is the one of squared_norms: a thread is a partial.
__global__ void block_sum_kernel(DeviceRanges ranges, const std::byte* grad, DType dtype, double* sums) {
  __shared__ float partial[kPartials];
  const Chunk chunk(ranges, blockIdx.x);
  const std::size_t first = range_of(ranges, chunk.segment).first + chunk.start;
  float own = 0;
  for (std::uint32_t i = threadIdx.x; i < chunk.count; i += kPartials) {
    const float raw = load_element(grad, dtype, first + i), x = is_finite(raw) ? raw : 0.0f;
    own += x * x;
  }
  partial[threadIdx.x] = own;
  double sum = add_in_halves(partial, threadIdx.x);
  if (threadIdx.x != 0) return;
  if (!(sum <= double(std::numeric_limits<float>::max()))) {  // squares of finite values beyond fp32's range: in double they fit
    sum = 0;
    for (std::uint32_t i = 0; i < chunk.count; ++i) {
      const float raw = load_element(grad, dtype, first + i);
      const double x = is_finite(raw) ? raw : 0.0f;
      sum += x * x;
    }
  }
  sums[blockIdx.x] = sum;
}

__global__ void norm_kernel(DeviceRanges ranges, const double* sums, double* norms) {
  __shared__ double partial[kPartials];
  const DeviceRange& range = range_of(ranges, blockIdx.x);
  const std::size_t blocks = device_chunks(range.count);
  double own = 0;
  for (std::size_t b = threadIdx.x; b < blocks; b += kPartials) own += sums[range.first_chunk + b];
  partial[threadIdx.x] = own;
  const double sum = add_in_halves(partial, threadIdx.x);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

__global__ void clip_kernel(Recursion recursion, DeviceRanges ranges, const double* norms, DeviceFactor unscale, int world,
                            std::size_t total_numel, float* factors) {
  const std::size_t s = std::size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (s >= ranges.segments) return;
  factors[s] = clip_factor(recursion.clip_norm, norms[s], range_of(ranges, std::uint32_t(s)).count, unscale.read(), world, total_numel);
}

template <Form form>
__global__ void __launch_bounds__(kThreads) dense_kernel(float rate, DeviceRanges ranges, const std::byte* grad, DType dtype,
                                                         const float* factors, const float* beta1, float* messages, std::uint32_t* flags) {
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  const float factor = factors != nullptr ? factors[dense.factor] : 1.0f;
  bool bad = false;
  for (std::uint32_t j = threadIdx.x; j < chunk.count; j += kThreads) {
    const std::size_t i = chunk.start + j;
    float g, x, u = 0;
    if (!news(load_element(grad, dtype, dense.range.first + i) * factor, g)) bad = true;
    const float held = dense.held ? dense.held[i] : 0.0f;
    if constexpr (has_momentum(form)) u = dense.momentum[i];
    if constexpr (is_averaged(form)) {
      const float beta = beta1[dense.factor];
      if (dense.momentum != nullptr) g = average(beta, 1.0f - beta, dense.momentum[i], g);
    }
    if (past_average(form) == Form::error_feedback && !dense.held) {
      x = g;
    } else {
      message<past_average(form)>(g, rate, held, u, x);
    }
    if (is_finite(x)) {
      if constexpr (has_momentum(form)) dense.momentum[i] = u;
    } else {  // the accumulated message overflowed: the element keeps its state and sends what it held
      x = held;
      bad = true;
    }
    if (dense.held) dense.held.set(i, x);
    messages[dense.packed + i] = dense.rounds ? wire_round(x, DType::bf16) : x;
  }
  if (bad) atomicOr(flags, std::uint32_t(kFlagNonfinite));
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(DeviceRanges ranges, const std::byte* grad, DType dtype, std::byte* messages, std::uint32_t* flags) {
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  bool bad = false;
  for (std::uint32_t j = threadIdx.x; j < chunk.count; j += kThreads) {
    const std::size_t from = dense.range.first + chunk.start + j, to = dense.packed + chunk.start + j;
    if (dtype == DType::fp32) {
      reinterpret_cast<float*>(messages)[to] = reinterpret_cast<const float*>(grad)[from];
    } else {
      reinterpret_cast<std::uint16_t*>(messages)[to] = reinterpret_cast<const std::uint16_t*>(grad)[from];
    }
    bad |= !is_finite(load_element(grad, dtype, from));
  }
  if (bad) atomicOr(flags, std::uint32_t(kFlagNonfinite));
}

__global__ void __launch_bounds__(kThreads) settle_kernel(DeviceRanges ranges, const std::uint32_t* verdict) {
  if (verdict != nullptr && (*verdict & kFlagNonfinite) != 0) return;
  const Chunk chunk(ranges, blockIdx.x);
  const DeviceDense& dense = dense_of(ranges, chunk.segment);
  if (!dense.residual || dense.keeps_rest) return;
  for (std::uint32_t j = threadIdx.x; j < chunk.count; j += kThreads) dense.residual.set(chunk.start + j, 0);
}

/// One element of a segment per visit(segment, element).
template <class Segment, class Visit>
__device__ inline void for_each_of(const DeviceRanges& ranges, Visit&& visit) {
  const Chunk chunk(ranges, blockIdx.x);
  const Segment& segment = static_cast<const Segment&>(states_of(ranges, chunk.segment));
  for (std::uint32_t j = threadIdx.x; j < chunk.count; j += kThreads) visit(segment, std::size_t(chunk.start + j));
}
template <class Visit>
__device__ inline void for_each(const DeviceRanges& ranges, Visit&& visit) {
  for_each_of<DeviceDense>(ranges, visit);
}

__global__ void __launch_bounds__(kThreads) keep_news_kernel(DeviceRanges ranges, const std::uint32_t* verdict) {
  if (verdict != nullptr && (*verdict & kFlagNonfinite) == 0) return;
  for_each_of<DeviceStates>(ranges, [](const DeviceStates& own, std::size_t i) {
    if (own.residual) own.residual.set(i, saturated(own.residual[i] + own.estimate[i]));
  });
}

__global__ void __launch_bounds__(kThreads)
    start_kernel(DeviceRanges ranges, const float* sums, float factor, const std::uint32_t* verdict) {
  const bool finite = (*verdict & kFlagNonfinite) == 0;
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) {
    if (!dense.estimate) return;
    if (finite) {
      const float message = dense.held[i];
      dense.estimate.set(i, message);
      const float estimate = dense.estimate[i];
      if (dense.residual) dense.residual.set(i, message - estimate);
      if (dense.average != nullptr) dense.average[i] = estimate;
      dense.mean_estimate[i] = sums[dense.packed + i] * factor;
    } else if (!dense.residual) {
      dense.estimate.set(i, 0);
      dense.mean_estimate[i] = 0;
    }
  });
}

__global__ void __launch_bounds__(kThreads) pack_kernel(DeviceRanges ranges, float* out) {
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) { out[dense.packed + i] = dense.estimate ? dense.estimate[i] : 0.0f; });
}

__global__ void __launch_bounds__(kThreads) mean_estimate_kernel(DeviceRanges ranges, const float* sums, float factor) {
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) {
    if (dense.mean_estimate != nullptr) dense.mean_estimate[i] = saturated(0.0f + sums[dense.packed + i] * factor);
  });
}

__global__ void __launch_bounds__(kThreads)
    note_momentum_kernel(DeviceRanges ranges, RankMessages messages, float factor, std::byte* grad, DType dtype, const float* unscale,
                         const float* beta1, bool averaging, float* out) {
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) {
    const std::size_t at = dense.range.first + i;
    const float beta = beta1[dense.factor];
    float mean = 0;
    if (averaging && !is_live(dense.live, i)) {
      store_element(grad, dtype, at, 0.0f);
    } else if (messages.first == nullptr) {
      mean = load_element(grad, dtype, at) * *unscale;
    } else {
      for (int r = 0; r < messages.world; ++r)
        mean += load_element(messages.first + std::size_t(r) * messages.stride, messages.dtype, dense.message + i);
      mean *= factor;
    }
    out[dense.packed + i] = averaging ? mean : average(beta, 1.0f - beta, dense.momentum[i], mean);
  });
}

__global__ void __launch_bounds__(kThreads) move_momentum_kernel(DeviceRanges ranges, const float* from, const std::uint32_t* verdict) {
  if ((*verdict & kFlagNonfinite) != 0) return;
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) { dense.momentum[i] = from[dense.packed + i]; });
}

__global__ void __launch_bounds__(kThreads) forget_momentum_kernel(DeviceRanges ranges, const float* beta1, const std::uint32_t* verdict) {
  if ((*verdict & kFlagNonfinite) == 0) return;
  for_each(ranges, [&](const DeviceDense& dense, std::size_t i) {
    if (dense.residual && dense.momentum != nullptr) dense.residual.set(i, dense.residual[i] - beta1[dense.factor] * dense.momentum[i]);
  });
}

}  // namespace

void launch_squared_norms(const DeviceRanges& ranges, ConstBytes grad, double* block_sums, double* norms, Stream stream) {
  launch("norm of blocks", block_sum_kernel, ranges.chunks, unsigned(kPartials), stream, ranges, grad.data, grad.dtype, block_sums);
  launch("norm", norm_kernel, ranges.segments, unsigned(kPartials), stream, ranges, block_sums, norms);
}

void launch_clip_factors(const Recursion& recursion, const DeviceRanges& ranges, const double* norms, DeviceFactor unscale, int world,
                         std::size_t total_numel, float* factors, Stream stream) {
  launch("clip factors", clip_kernel, (ranges.segments + kThreads - 1) / kThreads, kThreads, stream, recursion, ranges, norms, unscale,
         world, total_numel, factors);
}

void launch_dense_message(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors, float* messages,
                          std::uint32_t* flags, Stream stream, const float* beta1) {
  const auto run = [&](auto kernel) {
    launch("dense message", kernel, ranges.chunks, kThreads, stream, rate_of(recursion), ranges, grad.data, grad.dtype, factors, beta1,
           messages, flags);
  };
  THINWIRE_EXPECTS(!recursion.averaged || beta1 != nullptr || ranges.chunks == 0, "an averaged gradient needs beta1");
  switch (form_of(recursion)) {
    case Form::none:
    case Form::estimate:
    case Form::smoothed_estimate:
      return run(dense_kernel<Form::none>);
    case Form::error_feedback:
    case Form::control:
    case Form::smoothed_control:
      return run(dense_kernel<Form::error_feedback>);
    case Form::momentum:
      return run(dense_kernel<Form::momentum>);
    case Form::nesterov:
      return run(dense_kernel<Form::nesterov>);
    case Form::averaged:
      return run(dense_kernel<Form::averaged>);
    case Form::averaged_feedback:
      return run(dense_kernel<Form::averaged_feedback>);
  }
}

void launch_copy_message(const DeviceRanges& ranges, ConstBytes grad, std::byte* messages, std::uint32_t* flags, Stream stream) {
  launch("copied message", copy_kernel, ranges.chunks, kThreads, stream, ranges, grad.data, grad.dtype, messages, flags);
}

void launch_settle_dense(const DeviceRanges& ranges, const std::uint32_t* verdict, Stream stream) {
  launch("settle dense", settle_kernel, ranges.chunks, kThreads, stream, ranges, verdict);
}

void launch_keep_news(const Recursion& recursion, const DeviceRanges& ranges, const std::uint32_t* verdict, Stream stream) {
  if (recursion.control) launch("keep news", keep_news_kernel, ranges.chunks, kThreads, stream, ranges, verdict);
}

void launch_start_estimates(const DeviceRanges& ranges, const float* sums, float factor, const std::uint32_t* verdict, Stream stream) {
  launch("start estimates", start_kernel, ranges.chunks, kThreads, stream, ranges, sums, factor, verdict);
}

void launch_pack_estimates(const DeviceRanges& ranges, float* out, Stream stream) {
  launch("pack estimates", pack_kernel, ranges.chunks, kThreads, stream, ranges, out);
}

void launch_set_mean_estimates(const DeviceRanges& ranges, const float* sums, float factor, Stream stream) {
  launch("mean estimates", mean_estimate_kernel, ranges.chunks, kThreads, stream, ranges, sums, factor);
}

void launch_note_momentum(const DeviceRanges& ranges, const RankMessages& messages, float factor, Bytes grad, const float* unscale,
                          const float* beta1, bool averaging, float* out, Stream stream) {
  launch("note momentum", note_momentum_kernel, ranges.chunks, kThreads, stream, ranges, messages, factor, grad.data, grad.dtype, unscale,
         beta1, averaging, out);
}

void launch_move_momentum(const DeviceRanges& ranges, const float* from, const std::uint32_t* verdict, Stream stream) {
  launch("move momentum", move_momentum_kernel, ranges.chunks, kThreads, stream, ranges, from, verdict);
}

void launch_forget_momentum(const DeviceRanges& ranges, const float* beta1, const std::uint32_t* verdict, Stream stream) {
  launch("forget momentum", forget_momentum_kernel, ranges.chunks, kThreads, stream, ranges, beta1, verdict);
}

}  // namespace thinwire
