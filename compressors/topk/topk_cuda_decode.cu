// Payloads back into sums on a GPU. Bytes from peers are untrusted: the first kernel checks them, and the second stays inside its memory
// whatever they say.

#include "compressors/core/cuda_payload.cuh"
#include "compressors/topk/topk_cuda_entries.cuh"

namespace thinwire::topk {
namespace {

/// One rank's share of a segment.
struct Share {
  const DeviceSegment& segment;
  const std::byte *index, *value;
  std::uint32_t kept;

  __device__ Share(const DecodeCall& call, std::uint32_t rank, std::uint32_t s) : segment(call.table.segments[s]) {
    const std::byte* const payload = call.wire + rank * call.stride;
    index = payload + segment.index_at;
    value = payload + segment.value_at;
    kept = words_at(payload, sizeof(wire::Header))[s];
    if (kept > segment.capacity) kept = segment.capacity;
  }
  __device__ IndexForm form() const { return IndexForm(segment.form); }
  __device__ std::uint32_t u32(std::uint32_t entry) const { return reinterpret_cast<const std::uint32_t*>(index)[entry]; }
  __device__ std::uint32_t block_count(std::size_t block) const { return reinterpret_cast<const std::uint32_t*>(index)[block]; }
  __device__ std::uint32_t offset(std::uint32_t entry) const {
    return reinterpret_cast<const std::uint16_t*>(index + 4 * blocks_of(segment.range.count))[entry];
  }
  __device__ std::uint32_t word(std::size_t w) const { return reinterpret_cast<const std::uint32_t*>(index)[w]; }
};

__device__ inline void report(const DecodeCall& call, Fault fault, std::uint32_t rank, std::uint32_t s, std::uint64_t given,
                              std::uint64_t wanted) {
  report_corrupt(call.flags, call.report, unsigned(fault), rank, s, given, wanted);
}

/// Entries [from, to) of [first, end), whose offsets count from element `base` of the segment and lie below `limit`: they must ascend, and
/// each chunk of the range learns in `starts` which of them is its first.
template <class Offset>
__device__ void check_ascending(const DecodeCall& call, std::uint32_t rank, std::uint32_t s, Offset offset, std::uint32_t first,
                                std::uint32_t from, std::uint32_t to, std::uint32_t end, std::uint64_t base, std::uint64_t limit,
                                std::uint32_t* starts) {
  const auto chunks = std::uint32_t((limit + kDeviceChunk - 1) / kDeviceChunk);
  for (std::uint32_t e = from + threadIdx.x; e < to; e += kThreads) {
    const std::uint32_t own = offset(e), chunk = own / kDeviceChunk;
    std::uint32_t next = 0;  // chunks before it that have no entry of their own start here too
    if (own >= limit) report(call, Fault::range, rank, s, base + own, base + limit);
    if (e != first) {
      const std::uint32_t previous = offset(e - 1);
      if (own <= previous) report(call, Fault::order, rank, s, base + own, base + previous);
      next = previous / kDeviceChunk + 1;
    }
    for (std::uint32_t c = next; c <= chunk && c < chunks; ++c) starts[c] = e;
    if (e + 1 == end) {
      for (std::uint32_t c = chunk + 1; c < chunks; ++c) starts[c] = end;
    }
  }
  if (first == end) {
    for (std::uint32_t c = threadIdx.x; c < chunks; c += kThreads) starts[c] = end;
  }
}

__device__ inline bool value_is_finite(const std::byte* values, DType dtype, std::uint32_t i) {
  if (dtype == DType::fp32) return (reinterpret_cast<const std::uint32_t*>(values)[i] & 0x7f800000u) != 0x7f800000u;
  const std::uint32_t exponent = dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
  return (reinterpret_cast<const std::uint16_t*>(values)[i] & exponent) != exponent;
}

/// One block per rank and unit, and one per rank for the header.
__global__ void __launch_bounds__(kThreads) check_kernel(DecodeCall call) {
  __shared__ std::uint32_t sums[kWarps];
  const std::uint32_t rank = blockIdx.x / std::uint32_t(call.shape.units + 1), unit = blockIdx.x % std::uint32_t(call.shape.units + 1);
  if (unit == call.shape.units)
    return check_header(words_at(call.wire + rank * call.stride, 0), call.header, rank, call.flags, call.report);
  const std::uint32_t s = call.table.unit_segment[unit];
  const Share share(call, rank, s);
  const DeviceSegment& segment = share.segment;
  const std::uint32_t block = unit - segment.first_unit, blocks = std::uint32_t(blocks_of(segment.range.count));
  const std::uint32_t kept = words_at(call.wire + rank * call.stride, sizeof(wire::Header))[s];
  if (kept > segment.capacity) {
    if (threadIdx.x == 0) report(call, Fault::kept, rank, s, kept, segment.capacity);
    return;  // the one fault to name
  }
  const std::uint64_t base = std::uint64_t(block) * kBlock,
                      limit = segment.range.count - base < kBlock ? segment.range.count - base : kBlock;
  std::uint32_t* const starts = call.starts(rank, s, segment.range.first_chunk);
  if (block == 0 && threadIdx.x == 0) starts[(segment.range.count + kDeviceChunk - 1) / kDeviceChunk] = kept;
  // An even share of the entries: of a u32 index to check, and of all values.
  const auto from = std::uint32_t(std::uint64_t(share.kept) * block / blocks),
             to = std::uint32_t(std::uint64_t(share.kept) * (block + 1) / blocks);

  if (share.form() == IndexForm::u32) {
    const auto index = [&](std::uint32_t e) { return share.u32(e); };
    if (share.kept != 0 || block == 0) check_ascending(call, rank, s, index, 0, from, to, share.kept, 0, segment.range.count, starts);
  } else if (share.form() == IndexForm::u16) {
    std::uint32_t before = 0;
    for (std::uint32_t b = threadIdx.x; b < block; b += kThreads) before += share.block_count(b);
    before = block_sum(before, sums);
    const std::uint32_t own = share.block_count(block);
    const bool fits = before <= share.kept && own <= share.kept - before && (block + 1 != blocks || before + own == share.kept);
    if (!fits && threadIdx.x == 0) report(call, Fault::blocks, rank, s, std::uint64_t(before) + own, share.kept);
    const std::uint32_t first = fits ? before : 0, end = fits ? before + own : 0;
    const auto offset = [&](std::uint32_t e) { return share.offset(e); };
    check_ascending(call, rank, s, offset, first, first, end, end, base, limit, starts + block * (kBlock / kDeviceChunk));
  } else {
    // Each chunk's bits, counted from the unit's start; the units before it are added where they are needed.
    std::uint32_t counted = 0;
    for (std::uint32_t chunk = 0; chunk * kDeviceChunk < limit; ++chunk) {
      const std::uint64_t w = base / 32 + chunk * (kDeviceChunk / 32) + threadIdx.x;
      std::uint32_t word = 0;
      if (threadIdx.x < kDeviceChunk / 32 && 32 * w < segment.range.count) word = share.word(w);
      if (segment.range.count - 32 * w < 32 && 32 * w < segment.range.count && (word >> (segment.range.count - 32 * w)) != 0)
        report(call, Fault::padding, rank, s, segment.range.count - 1, 0);
      if (threadIdx.x == 0) starts[block * (kBlock / kDeviceChunk) + chunk] = counted;
      counted += block_sum(std::uint32_t(__popc(word)), sums);
      __syncthreads();
    }
    if (threadIdx.x == 0) call.unit_count[rank * call.shape.units + unit] = counted;
  }
  for (std::uint32_t e = from + threadIdx.x; e < to; e += kThreads) {
    if (!value_is_finite(share.value, call.wire_dtype, e)) report(call, Fault::finite, rank, s, e, share.kept);
  }
}

/// Adds a rank's bits of one chunk. By a whole block; returns after a barrier.
__device__ void add_bits(const DecodeCall& call, const Share& share, std::uint32_t rank, std::uint32_t s, std::uint32_t chunk, float* sum,
                         std::uint32_t* sums) {
  const DeviceSegment& segment = share.segment;
  const std::uint32_t unit = chunk / (kBlock / kDeviceChunk);
  const std::uint32_t* const counts = call.unit_count + rank * call.shape.units + segment.first_unit;
  std::uint32_t before = 0;
  for (std::uint32_t u = threadIdx.x; u < unit; u += kThreads) before += counts[u];
  before = block_sum(before, sums);
  __syncthreads();
  const bool last = std::uint64_t(chunk + 1) * kDeviceChunk >= segment.range.count;
  if (last && threadIdx.x == 0 && before + counts[unit] != share.kept)
    report(call, Fault::bits, rank, s, before + counts[unit], share.kept);

  const std::uint64_t w = std::uint64_t(chunk) * (kDeviceChunk / 32) + threadIdx.x;
  std::uint32_t word = 0;
  if (threadIdx.x < kDeviceChunk / 32 && 32 * w < segment.range.count) word = share.word(w);
  const auto own = std::uint32_t(__popc(word));
  const std::uint32_t through = warp_inclusive_sum(own);
  if (lane() == 31) sums[warp()] = through;
  __syncthreads();
  std::uint32_t e = before + call.starts(rank, s, segment.range.first_chunk)[chunk] + through - own;
  for (unsigned v = 0; v < warp(); ++v) e += sums[v];
  for (; word != 0; word &= word - 1, ++e) {
    if (e < share.kept) sum[32 * threadIdx.x + unsigned(__ffs(int(word))) - 1] += load_element(share.value, call.wire_dtype, e);
  }
  __syncthreads();
}

/// A value as it lies in a payload, and what it means.
__device__ inline std::uint32_t value_bits(const std::byte* values, DType dtype, std::uint32_t e) {
  return dtype == DType::fp32 ? reinterpret_cast<const std::uint32_t*>(values)[e] : reinterpret_cast<const std::uint16_t*>(values)[e];
}
__device__ inline float value_of(std::uint32_t bits, DType dtype) {
  return dtype == DType::fp32   ? bits_float(bits)
         : dtype == DType::bf16 ? half_to_float<DType::bf16>(std::uint16_t(bits))
                                : half_to_float<DType::fp16>(std::uint16_t(bits));
}

/// One block per chunk of the output: ranks are added one after the other in shared memory, then the mean is written once. Reads the
/// entries, writes out.count() elements.
__global__ void __launch_bounds__(kThreads, 5) decode_kernel(DecodeCall call) {
  constexpr unsigned kAhead =
      4;  // ranks whose entries are on their way together: where they lie, then they themselves, then they are added
  __shared__ float sum[kDeviceChunk];
  __shared__ std::uint32_t sums[kWarps];
  const std::uint32_t s = call.table.chunk_segment[blockIdx.x];
  const DeviceSegment segment = call.table.segments[s];
  const std::uint32_t chunk = blockIdx.x - segment.range.first_chunk;
  const std::uint64_t start = std::uint64_t(chunk) * kDeviceChunk;
  const auto count = std::uint32_t(segment.range.count - start < kDeviceChunk ? segment.range.count - start : kDeviceChunk);
  for (unsigned i = threadIdx.x; i < kDeviceChunk; i += kThreads) sum[i] = 0;
  __syncthreads();

  const bool bits = IndexForm(segment.form) == IndexForm::bitmap, wide = IndexForm(segment.form) == IndexForm::u32;
  const auto base = std::uint32_t(wide ? start : start % kBlock);
  const std::size_t offsets_at = segment.index_at + (wide ? 0 : 4 * blocks_of(segment.range.count));
  const auto index_of = [&](const std::byte* payload, std::uint32_t e) -> std::uint32_t {
    const std::byte* const at = payload + offsets_at;
    return (wide ? reinterpret_cast<const std::uint32_t*>(at)[e] : reinterpret_cast<const std::uint16_t*>(at)[e]) - base;
  };
  for (std::uint32_t r0 = 0; r0 < call.world; r0 += kAhead) {
    if (bits) {
      for (std::uint32_t r = r0; r < r0 + kAhead && r < call.world; ++r) add_bits(call, Share(call, r, s), r, s, chunk, sum, sums);
      continue;
    }
    std::uint32_t begin[kAhead], end[kAhead], at[kAhead], value[kAhead];
#pragma unroll
    for (unsigned q = 0; q < kAhead; ++q) {
      begin[q] = end[q] = 0;
      if (r0 + q >= call.world) continue;
      const std::uint32_t* const starts = call.starts(r0 + q, s, segment.range.first_chunk);
      begin[q] = starts[chunk];
      end[q] = starts[chunk + 1];
    }
#pragma unroll
    for (unsigned q = 0; q < kAhead; ++q) {
      if (end[q] > segment.capacity) end[q] = segment.capacity;  // an unsound payload's
      const std::byte* const payload = call.wire + (r0 + q) * call.stride;
      const std::uint32_t e = begin[q] + threadIdx.x;
      at[q] = kDeviceChunk;
      if (begin[q] < end[q] && e < end[q]) {
        at[q] = index_of(payload, e);
        value[q] = value_bits(payload + segment.value_at, call.wire_dtype, e);
      }
    }
#pragma unroll
    for (unsigned q = 0; q < kAhead; ++q) {
      if (r0 + q >= call.world) break;
      if (at[q] < kDeviceChunk) sum[at[q]] += value_of(value[q], call.wire_dtype);
      if (begin[q] < end[q] && end[q] - begin[q] > kThreads) {
        const std::byte* const payload = call.wire + (r0 + q) * call.stride;
        for (std::uint32_t e = begin[q] + kThreads + threadIdx.x; e < end[q]; e += kThreads) {
          const std::uint32_t i = index_of(payload, e);
          if (i < kDeviceChunk) sum[i] += value_of(value_bits(payload + segment.value_at, call.wire_dtype, e), call.wire_dtype);
        }
      }
      __syncthreads();
    }
  }

  bool bad = false;
  const float factor = call.factor.read();
  const std::size_t first = segment.range.first + start;
  if (call.estimates) {
    float* const means = segment.mean_estimate + start;
    const float scale = call.output_factor.read();
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
      means[i] = feedback::saturated(means[i] + sum[i] * factor);
      bad |= !store_element(call.out, call.out_dtype, first + i, means[i] * scale);
    }
  } else {
    for (unsigned i = threadIdx.x; i < count; i += kThreads) bad |= !store_element(call.out, call.out_dtype, first + i, sum[i] * factor);
  }
  if (bad && call.flags != nullptr) atomicOr(call.flags, std::uint32_t(kFlagNonfinite));
}

/// One block per unit of this rank's own payload, which needs no check.
__global__ void __launch_bounds__(kThreads) take_back_kernel(DecodeCall call, const std::uint32_t* verdict) {
  __shared__ std::uint32_t sums[kWarps];
  if (verdict != nullptr && (*verdict & kFlagNonfinite) == 0) return;
  const std::uint32_t s = call.table.unit_segment[blockIdx.x];
  const Share share(call, 0, s);
  const DeviceSegment& segment = share.segment;
  if (!segment.residual) return;
  const std::uint32_t block = blockIdx.x - segment.first_unit, blocks = std::uint32_t(blocks_of(segment.range.count));
  const std::uint64_t base = std::uint64_t(block) * kBlock;
  const auto add = [&](std::uint64_t i, std::uint32_t e) {
    segment.residual.set(i, segment.residual[i] + load_element(share.value, call.wire_dtype, e));
  };

  if (share.form() == IndexForm::u32) {
    const auto from = std::uint32_t(std::uint64_t(share.kept) * block / blocks),
               to = std::uint32_t(std::uint64_t(share.kept) * (block + 1) / blocks);
    for (std::uint32_t e = from + threadIdx.x; e < to; e += kThreads) add(share.u32(e), e);
  } else if (share.form() == IndexForm::u16) {
    std::uint32_t before = 0;
    for (std::uint32_t b = threadIdx.x; b < block; b += kThreads) before += share.block_count(b);
    before = block_sum(before, sums);
    const std::uint32_t end = before + share.block_count(block);
    for (std::uint32_t e = before + threadIdx.x; e < end; e += kThreads) add(base + share.offset(e), e);
  } else {
    std::uint32_t before = 0;  // rare enough to count all bits before the unit
    for (std::uint64_t w = threadIdx.x; w < base / 32; w += kThreads) before += std::uint32_t(__popc(share.word(w)));
    before = block_sum(before, sums);
    for (std::uint64_t w0 = base / 32; w0 < (base + kBlock) / 32 && 32 * w0 < segment.range.count; w0 += kThreads) {
      __syncthreads();
      std::uint32_t word = 32 * (w0 + threadIdx.x) < segment.range.count ? share.word(w0 + threadIdx.x) : 0;
      const auto own = std::uint32_t(__popc(word));
      const std::uint32_t through = warp_inclusive_sum(own);
      if (lane() == 31) sums[warp()] = through;
      __syncthreads();
      std::uint32_t e = before + through - own;
      for (unsigned v = 0; v < kWarps; ++v) {
        if (v < warp()) e += sums[v];
        before += sums[v];
      }
      for (; word != 0; word &= word - 1, ++e) add(32 * (w0 + threadIdx.x) + unsigned(__ffs(int(word))) - 1, e);
    }
  }
}

__global__ void __launch_bounds__(kThreads) empty_kernel(std::uint32_t* wire, wire::Header header, std::size_t words) {
  constexpr std::size_t kHeader = sizeof(wire::Header) / 4;
  if (blockIdx.x == 0 && threadIdx.x < kHeader) wire[threadIdx.x] = reinterpret_cast<const std::uint32_t*>(&header)[threadIdx.x];
  clear_share(wire + kHeader, words - kHeader);
}

}  // namespace

void launch_decode(const DecodeCall& call, Stream stream) {
  launch("topk check", check_kernel, call.world * (call.shape.units + 1), kThreads, stream, call);
  launch("topk decode", decode_kernel, call.shape.chunks, kThreads, stream, call);
}

void launch_take_back(const DecodeCall& call, const std::uint32_t* verdict, Stream stream) {
  launch("topk take back", take_back_kernel, call.shape.units, kThreads, stream, call, verdict);
}

void launch_empty(std::byte* wire, const wire::Header& header, Stream stream) {
  launch("topk empty", empty_kernel, header.bytes / 65536 + 1, kThreads, stream, reinterpret_cast<std::uint32_t*>(wire), header,
         std::size_t(header.bytes / 4));
}

}  // namespace thinwire::topk
