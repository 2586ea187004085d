#include "bench/unordered.hpp"
#include "compressors/topk/topk_cuda_entries.cuh"

namespace thinwire::bench {
namespace {

using namespace thinwire::topk;

constexpr unsigned kPer = 4, kVectors = kDeviceChunk / kThreads / kPer;

/// One block per chunk, as the ordered pass: state read and written once, hits gathered in shared memory, then sent. Two atomics in place
/// of two scans: a warp takes its places among the chunk's, a chunk its places among the segment's.
__global__ void __launch_bounds__(kThreads, 4) unordered_kernel(EncodeCall call) {
  __shared__ std::uint32_t total, before;
  __shared__ std::uint16_t offsets[kDeviceChunk];
  __shared__ float values[kDeviceChunk];

  const std::uint32_t s = call.table.chunk_segment[blockIdx.x];
  const DeviceSegment segment = call.table.segments[s];
  const std::uint32_t chunk = blockIdx.x - segment.range.first_chunk;
  const std::size_t start = std::size_t(chunk) * kDeviceChunk;
  const auto count = std::uint32_t(segment.range.count - start < kDeviceChunk ? segment.range.count - start : kDeviceChunk);
  const float* const grad = reinterpret_cast<const float*>(call.grad) + segment.range.first + start;
  const bool aligned = reinterpret_cast<std::uintptr_t>(grad) % 16 == 0;
  const float factor = call.grad_factor != nullptr ? call.grad_factor[s] : 1.0f, threshold = call.scratch.threshold[s];
  float* const residual = segment.residual.fp32() + start;
  if (threadIdx.x == 0) total = 0;

  float g[kVectors * kPer], x[kVectors * kPer];
  const auto load = [](const float* from, float* to) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  };
  if (count == kDeviceChunk && aligned) {
#pragma unroll
    for (unsigned v = 0; v < kVectors; ++v) {
      const std::uint32_t i = (v * kThreads + threadIdx.x) * kPer;
      load(grad + i, g + v * kPer);
      load(residual + i, x + v * kPer);
    }
  } else {
#pragma unroll
    for (unsigned v = 0; v < kVectors; ++v) {
      const std::uint32_t i = (v * kThreads + threadIdx.x) * kPer;
      for (unsigned j = 0; j < kPer; ++j) {
        g[v * kPer + j] = i + j < count ? grad[i + j] : 0.0f;
        x[v * kPer + j] = i + j < count ? residual[i + j] : 0.0f;
      }
    }
  }

  std::uint32_t hits = 0;
  bool bad = false;
#pragma unroll
  for (unsigned v = 0; v < kVectors; ++v) {
    const std::uint32_t i = (v * kThreads + threadIdx.x) * kPer, in = i < count ? count - i : 0;
    const std::uint32_t alive = live_bits(segment.live, start + i, in >= kPer ? kPer : in);
#pragma unroll
    for (unsigned j = 0; j < kPer; ++j) {
      const unsigned e = v * kPer + j;
      const bool here = ((alive >> j) & 1u) != 0;
      float none = 0, stays = x[e];
      bool wrong = false;
      g[e] = step_element<Form::error_feedback>(g[e] * factor, call.rate, stays, none, wrong);
      bad |= here && wrong;
      x[e] = here ? stays : x[e];
      hits |= std::uint32_t(here && magnitude(g[e]) >= threshold) << e;
    }
    if (i + kPer <= count) {
      *reinterpret_cast<float4*>(residual + i) = float4{x[v * kPer], x[v * kPer + 1], x[v * kPer + 2], x[v * kPer + 3]};
    } else {
      for (unsigned j = 0; j < kPer && i + j < count; ++j) residual[i + j] = x[v * kPer + j];
    }
  }
  if (bad) {
    atomicOr(words_at(call.wire, offsetof(wire::Header, flags)), std::uint32_t(kFlagNonfinite));
    if (call.flags != nullptr) atomicOr(call.flags, std::uint32_t(kFlagNonfinite));
  }

  __syncthreads();
  const auto own = std::uint32_t(__popc(hits));
  const std::uint32_t through = warp_inclusive_sum(own);
  std::uint32_t first = 0;
  if (lane() == 31 && through != 0) first = atomicAdd(&total, through);
  std::uint32_t place = __shfl_sync(kFullWarp, first, 31) + through - own;
#pragma unroll
  for (unsigned e = 0; e < kVectors * kPer; ++e) {
    if (((hits >> e) & 1u) == 0) continue;
    offsets[place] = std::uint16_t((e / kPer * kThreads + threadIdx.x) * kPer + e % kPer);
    values[place++] = g[e];
  }
  __syncthreads();
  if (threadIdx.x == 0) before = total != 0 ? atomicAdd(&call.scratch.hits[s], total) : 0;
  __syncthreads();

  const std::uint32_t room = segment.capacity, sent = before >= room ? 0 : room - before < total ? room - before : total;
  for (std::uint32_t j = threadIdx.x; j < sent; j += kThreads) {
    const std::size_t i = start + offsets[j];
    send_value(call, segment, before + j, i, values[j]);
    send_index(call, segment, before + j, i);
  }
  // The last chunk of the segment to come here knows how many there are; look-back's words are free, and zero.
  if (threadIdx.x != 0) return;
  __threadfence();
  auto* const finished = reinterpret_cast<std::uint32_t*>(call.scratch.looked_back + segment.range.first_chunk);
  const auto chunks = std::uint32_t((segment.range.count + kDeviceChunk - 1) / kDeviceChunk);
  if (atomicAdd(finished, 1u) + 1 != chunks) return;
  const std::uint32_t all = atomicAdd(&call.scratch.hits[s], 0u);
  send_kept(call, s, all < room ? all : room);
  if (segment.memory != nullptr && segment.sampled != 0)
    *segment.memory = next_threshold(threshold, all, segment.k, call.scratch.steepness[s]);
}

void launch_unordered(const EncodeCall& call, Form form, Stream stream) {
  THINWIRE_EXPECTS(form == Form::error_feedback && call.grad_dtype == DType::fp32 && !call.exact,
                   "the unordered pass is EF14's, on fp32 gradients, sampled");
  launch_thresholds(call, form, stream);
  launch("unordered pass", unordered_kernel, call.shape.chunks, kThreads, stream, call);
}

}  // namespace

std::unique_ptr<const Codec> make_topk_unordered(TopKOptions options) {
  options.index = TopKOptions::Index::u32;
  return make_topk_cuda_with(options, launch_unordered);
}

}  // namespace thinwire::bench
