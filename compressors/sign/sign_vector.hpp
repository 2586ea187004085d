#pragma once
// The vector twin of sign_scalar.cpp, once for all widths. Only an ISA's own file includes it, under its target pragma, after every other
// header. L is the vocabulary of one vector (core/vector_*.hpp).

#include "compressors/feedback/feedback_math.hpp"
#include "compressors/sign/sign_math.hpp"

namespace thinwire::sign {
namespace {

inline constexpr std::size_t kRow = 64;  // elements between two looks at the bits: one word

inline std::uint64_t word_at(const std::uint8_t* bits) noexcept {
  std::uint64_t word;
  std::memcpy(&word, bits, 8);
  return word;
}

template <class L, Scale scale, Form form, DType dtype, bool masked>
std::uint32_t encode_rows(const Chunk& c, float* partial, std::uint8_t* bits) {
  using V = typename L::V;
  constexpr std::size_t kVectors = kRow / L::kWidth;
  const V factor = L::set(c.factor), rate = L::set(c.rate), beta = L::set(c.beta), fresh = L::set(1.0f - c.beta);
  const V infinity = L::set(bits_float(0x7f800000u));
  V sum[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::load(partial + j * L::kWidth);
  std::uint32_t flags = 0;
  std::size_t i = 0;
  for (; i + kRow <= c.count; i += kRow) {
    V x[kVectors];
    auto bad = L::lanes(false);
    for (std::size_t j = 0; j < kVectors; ++j) {
      const std::size_t at = i + j * L::kWidth;
      V g = L::template load_grad<dtype>(c.grad, at) * factor, residual{}, unused{};
      if constexpr (feedback::has_residual(form)) residual = L::load(c.residual + at);
      if constexpr (feedback::is_averaged(form)) g = feedback::average(beta, fresh, L::load(c.momentum + at), g);
      feedback::message<feedback::past_average(form)>(g, rate, residual, unused, x[j]);
      bad = L::either(bad, L::not_less(L::abs(x[j]), infinity));
    }
    if (L::any(bad)) [[unlikely]] {
      for (std::size_t j = 0; j < kVectors; ++j) L::store(partial + j * L::kWidth, sum[j]);
      flags |= range_kernel(scale, form, dtype)(c, i, i + kRow, partial, bits);
      for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::load(partial + j * L::kWidth);
      continue;
    }
    std::uint64_t word = ~L::negatives(x), live = 0;
    if constexpr (masked) word &= live = word_at(c.live + i / 8);
    std::memcpy(bits + i / 8, &word, 8);
    for (std::size_t j = 0; j < kVectors; ++j) {
      V w = weight<scale>(L::abs(x[j]));
      const std::size_t at = i + j * L::kWidth;
      if constexpr (masked) {
        const auto alive = L::mask_of(live >> (j * L::kWidth));
        w = L::choose(alive, w, L::set(0.0f));
        if constexpr (feedback::has_residual(form)) x[j] = L::choose(alive, x[j], L::load(c.residual + at));
      }
      sum[j] += w;
      if constexpr (feedback::has_residual(form)) L::store(c.residual + at, x[j]);
    }
  }
  for (std::size_t j = 0; j < kVectors; ++j) L::store(partial + j * L::kWidth, sum[j]);
  return flags | range_kernel(scale, form, dtype)(c, i, c.count, partial, bits);
}

template <class L, Scale scale, Form form, DType dtype>
std::uint32_t encode(const Chunk& chunk, float* partial, std::uint8_t* bits) {
  return chunk.live == nullptr ? encode_rows<L, scale, form, dtype, false>(chunk, partial, bits)
                               : encode_rows<L, scale, form, dtype, true>(chunk, partial, bits);
}

template <class L>
void leave(float* residual, const std::uint8_t* live, std::size_t count, float scale) {
  using V = typename L::V;
  const V plus = L::set(scale), minus = L::set(-scale);
  std::size_t i = 0;
  for (; i + kRow <= count; i += kRow) {
    const std::uint64_t alive = live != nullptr ? word_at(live + i / 8) : ~std::uint64_t(0);
    for (std::size_t j = 0; j < kRow; j += L::kWidth) {
      const V x = L::load(residual + i + j);
      V left;
      feedback::leave(x, L::choose(L::below_zero(x), minus, plus), left);
      if (live != nullptr) left = L::choose(L::mask_of(alive >> j), left, x);
      L::store(residual + i + j, left);
    }
  }
  kernels_scalar().leave(residual + i, live != nullptr ? live + i / 8 : nullptr, count - i, scale);
}

enum class Write { plain, halves, streaming };

/// Sums of pairs of ranks come from a table of four: {−s0 − s1, s0 − s1, −s0 + s1, s0 + s1}.
inline void fill_table(const float* scales, float* table) noexcept {
  for (int b = 0; b < 4; ++b) table[b] = value_of((b & 1) != 0, scales[0]) + value_of((b & 2) != 0, scales[1]);
}
inline constexpr std::size_t kTables = 32;  // pairs whose tables are made once per call

template <class L, DType dtype, Write write>
bool decode_rows(const Peers& peers, std::size_t count, float factor, void* out) {
  using V = typename L::V;
  constexpr std::size_t kVectors = kRow / L::kWidth;
  const std::size_t pairs = peers.count / 2;
  alignas(64) float tables[4 * kTables], spare[4];
  for (std::size_t p = 0; p < std::min(pairs, kTables); ++p) fill_table(peers.scales + 2 * p, tables + 4 * p);
  const float last = peers.scales[peers.count - 1], single[4] = {-last, last, -last, last};
  const V f = L::set(factor), infinity = L::set(bits_float(0x7f800000u));
  auto bad = L::lanes(false);
  std::size_t i = 0;
  for (; i + kRow <= count; i += kRow) {
    V sum[kVectors];
    const auto word = [&](std::size_t r) { return word_at(peers.bits[r] + peers.offset + i / 8); };
    const auto add = [&](const float* table, std::uint64_t a, std::uint64_t b, bool first) {
      for (std::size_t j = 0; j < kVectors; ++j) {
        const V value = L::look_up(table, a >> (j * L::kWidth), b >> (j * L::kWidth));
        sum[j] = first ? value : sum[j] + value;
      }
    };
    if (pairs == 0) {
      add(single, word(0), 0, true);
    } else {
      add(tables, word(0), word(1), true);
    }
    for (std::size_t p = 1; p < pairs; ++p) {
      const float* table = tables + 4 * p;
      if (p >= kTables) {
        fill_table(peers.scales + 2 * p, spare);
        table = spare;
      }
      add(table, word(2 * p), word(2 * p + 1), false);
    }
    if (peers.count % 2 != 0 && pairs != 0) add(single, word(peers.count - 1), 0, false);
    const std::uint64_t live = peers.live != nullptr ? word_at(peers.live + i / 8) : ~std::uint64_t(0);
    for (std::size_t j = 0; j < kVectors; ++j) {
      V mean = sum[j] * f;
      if (peers.live != nullptr) mean = L::choose(L::mask_of(live >> (j * L::kWidth)), mean, L::set(0.0f));
      const std::size_t at = i + j * L::kWidth;
      if constexpr (dtype == DType::bf16) mean = L::nearest_bf16(mean);
      if constexpr (dtype == DType::fp16) mean = L::nearest_fp16(mean);
      bad = L::either(bad, L::not_less(L::abs(mean), infinity));
      if constexpr (dtype == DType::bf16) L::store_bf16(static_cast<std::uint16_t*>(out) + at, mean);
      if constexpr (dtype == DType::fp16) L::store_fp16(static_cast<std::uint16_t*>(out) + at, mean);
      if constexpr (dtype == DType::fp32) {
        float* p = static_cast<float*>(out) + at;
        if constexpr (write == Write::plain) L::store(p, mean);
        if constexpr (write == Write::halves) L::stream_halves(p, mean);
        if constexpr (write == Write::streaming) L::template store_out<true>(p, mean);
      }
    }
  }
  if constexpr (write != Write::plain) _mm_sfence();
  return !L::any(bad) & decode_range(peers, i, count, factor, dtype, out);
}

template <class L, DType dtype>
bool decode(const Peers& peers, std::size_t count, float factor, void* out, bool streaming) {
  if constexpr (dtype == DType::fp32) {
    const auto place = reinterpret_cast<std::uintptr_t>(out);
    if (streaming && place % (4 * L::kWidth) == 0) return decode_rows<L, dtype, Write::streaming>(peers, count, factor, out);
    if (streaming && place % (2 * L::kWidth) == 0) return decode_rows<L, dtype, Write::halves>(peers, count, factor, out);
  }
  return decode_rows<L, dtype, Write::plain>(peers, count, factor, out);
}

template <class L>
constexpr Kernels make_kernels() noexcept {
  Kernels out{};
  const auto fill = [&]<Scale scale, Form form>() {
    out.encode[std::size_t(scale)][std::size_t(form)] = {encode<L, scale, form, DType::fp32>, encode<L, scale, form, DType::bf16>,
                                                         encode<L, scale, form, DType::fp16>};
  };
  const auto fill_scale = [&]<Scale scale>() {
    fill.template operator()<scale, Form::none>();
    fill.template operator()<scale, Form::error_feedback>();
    fill.template operator()<scale, Form::averaged>();
    fill.template operator()<scale, Form::averaged_feedback>();
  };
  fill_scale.template operator()<Scale::l1>();
  fill_scale.template operator()<Scale::l2>();
  out.leave = leave<L>;
  out.decode = {decode<L, DType::fp32>, decode<L, DType::bf16>, decode<L, DType::fp16>};
  return out;
}

}  // namespace
}  // namespace thinwire::sign
