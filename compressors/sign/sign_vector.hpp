#pragma once
// The vector twin of sign_scalar.cpp, once for all widths. Only an ISA's own file includes it, under its target pragma, after every other
// header. L is the vocabulary of one vector (core/vector_*.hpp).

#include "compressors/core/prefetch.hpp"
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

/// What follows elements [i, i + count), of every array that the form reads.
template <std::size_t count, Form form, DType dtype>
[[gnu::always_inline]] inline void prefetch(const Chunk& c, std::size_t i) noexcept {
  prefetch_ahead<count * size_of(dtype)>(static_cast<const std::byte*>(c.grad) + i * size_of(dtype));
  if constexpr (feedback::has_residual(form)) prefetch_ahead<count * 4>(c.residual + i);
  if constexpr (feedback::is_averaged(form)) prefetch_ahead<count * 4>(c.momentum + i);
  if constexpr (feedback::has_estimate(form)) prefetch_ahead<count * 4>(c.estimate + i);
  if constexpr (feedback::is_smoothed(form)) prefetch_ahead<count * 4>(c.average + i);
}

/// A chunk's coefficients as vectors. `beta`: of the average that the form has.
template <class L, Form form>
struct Factors {
  using V = typename L::V;
  V grad, rate, beta, fresh;
  explicit Factors(const Chunk& c) noexcept
      : grad(L::set(c.factor)),
        rate(L::set(c.rate)),
        beta(L::set(feedback::is_smoothed(form) ? c.keep : c.beta)),
        fresh(L::set(feedback::is_smoothed(form) ? c.fresh : 1.0f - c.beta)) {}
};

/// A vector of elements of a form with an estimate, as feedback::estimated is one.
template <class L, Form form>
struct Estimates {
  using V = typename L::V;
  V x{}, residual{}, average{}, estimate;

  [[gnu::always_inline]] Estimates(const Chunk& c, const Factors<L, form>& factors, std::size_t at, V g) noexcept {
    g *= factors.grad;
    if constexpr (feedback::has_residual(form)) residual = L::load(c.residual + at);
    if constexpr (feedback::is_smoothed(form)) average = g = feedback::average(factors.beta, factors.fresh, L::load(c.average + at), g);
    estimate = L::load(c.estimate + at);
    feedback::estimate_message<form>(g, factors.rate, estimate, residual, x);
  }
  /// Not finite where an element sits the step out.
  [[gnu::always_inline]] V message_most() const noexcept {
    if constexpr (feedback::has_residual(form)) return L::larger_bits(L::abs(x), L::abs(residual));
    return L::abs(x);
  }
  /// At kAmple or above: what is kept is to be looked at element by element.
  [[gnu::always_inline]] V most() const noexcept { return L::larger_bits(message_most(), L::abs(estimate)); }
};

/// A row in units of four vectors: with sums of a whole row, what one unit needs fits into sixteen registers.
template <class L, Scale scale, Form form, DType dtype, bool masked>
std::uint32_t encode_rows(const Chunk& c, float* partial, std::uint8_t* bits) {
  using V = typename L::V;
  using Word = typename L::Word;  // a bit for each element of a unit
  constexpr std::size_t kVectors = kRow / L::kWidth, kUnit = 4 * L::kWidth;
  const Factors<L, form> factors(c);
  const V infinity = L::set(bits_float(0x7f800000u));
  V sum[kVectors];
  for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::load(partial + j * L::kWidth);
  std::uint32_t flags = 0;
  const auto unit = [&](std::size_t i, V * sums) __attribute__((always_inline)) {
    V x[4], most{};
    prefetch<kUnit, form, dtype>(c, i);
    for (std::size_t j = 0; j < 4; ++j) {
      const std::size_t at = i + j * L::kWidth;
      if constexpr (feedback::has_estimate(form)) {
        Estimates<L, form> element(c, factors, at, L::template load_grad<dtype>(c.grad, at));
        x[j] = element.x;
        most = j == 0 ? element.message_most() : L::larger_bits(most, element.message_most());
      } else {
        V g = L::template load_grad<dtype>(c.grad, at) * factors.grad, residual{}, unused{};
        if constexpr (feedback::has_residual(form)) residual = L::load(c.residual + at);
        if constexpr (feedback::is_averaged(form)) g = feedback::average(factors.beta, factors.fresh, L::load(c.momentum + at), g);
        feedback::message<feedback::past_average(form)>(g, factors.rate, residual, unused, x[j]);
        most = j == 0 ? L::abs(x[j]) : L::larger_bits(most, L::abs(x[j]));
      }
    }
    if (L::any(L::not_less(most, infinity))) [[unlikely]] {
      for (std::size_t j = 0; j < kVectors; ++j) L::store(partial + j * L::kWidth, sum[j]);
      flags |= range_kernel(scale, form, dtype)(c, i, i + kUnit, partial, bits);
      for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::load(partial + j * L::kWidth);
      return;
    }
    Word word = Word(~L::negatives_of_four(x)), live = 0;
    if constexpr (masked) {
      std::memcpy(&live, c.live + i / 8, sizeof live);
      word &= live;
    }
    std::memcpy(bits + i / 8, &word, sizeof word);
    for (std::size_t j = 0; j < 4; ++j) {
      V w = weight<scale>(L::abs(x[j]));
      const std::size_t at = i + j * L::kWidth;
      if constexpr (masked) {
        const auto alive = L::mask_of(live >> (j * L::kWidth));
        w = L::choose(alive, w, L::set(0.0f));
        if constexpr (keeps_message(form)) x[j] = L::choose(alive, x[j], L::load(c.residual + at));
      }
      sums[j] += w;
      if constexpr (keeps_message(form)) L::store(c.residual + at, x[j]);
    }
  };
  std::size_t i = 0;
  for (; i + kRow <= c.count; i += kRow) {
    unit(i, sum);
    if constexpr (kVectors == 8) unit(i + kUnit, sum + 4);
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
    prefetch_ahead<kRow * 4>(residual + i);
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

template <class L, Form form, DType dtype>
void commit(const Chunk& c, const std::uint8_t* bits, float scale) {
  using V = typename L::V;
  const CommitRange one_by_one = commit_range(form, dtype);
  if (!(scale < feedback::kAmple) || c.live != nullptr) return one_by_one(c, 0, c.count, bits, scale);
  const Factors<L, form> factors(c);
  const V plus = L::set(scale), minus = L::set(-scale), limit = L::set(feedback::kAmple);
  std::size_t i = 0;
  for (; i + kRow <= c.count; i += kRow) {
    prefetch<kRow, form, dtype>(c, i);
    const std::uint64_t word = word_at(bits + i / 8);
    for (std::size_t j = 0; j < kRow; j += L::kWidth) {
      const std::size_t at = i + j;
      const Estimates<L, form> element(c, factors, at, L::template load_grad<dtype>(c.grad, at));
      if (L::any(L::not_less(element.most(), limit))) [[unlikely]] {
        one_by_one(c, at, at + L::kWidth, bits, scale);
        continue;
      }
      const V value = L::choose(L::mask_of(word >> j), plus, minus);
      L::store(c.estimate + at, element.estimate + value);
      if constexpr (feedback::has_residual(form)) L::store(c.residual + at, element.residual - value);
      if constexpr (feedback::is_smoothed(form)) L::store(c.average + at, element.average);
    }
  }
  one_by_one(c, i, c.count, bits, scale);
}

enum class Write { plain, halves, streaming };

/// Pairs of ranks in a table; an odd last rank is a pair with one that sends nothing.
inline constexpr std::size_t kPairs = 128;

/// Sums of pairs of ranks are looked up: {−s0 − s1, s0 − s1, −s0 + s1, s0 + s1} by the two ranks' bits.
struct PairTables {
  alignas(64) float sums[kPairs][4];  // only what there are pairs for
  std::size_t pairs;

  explicit PairTables(const Peers& peers) noexcept : pairs((peers.count + 1) / 2) {
    if (pairs == 0) __builtin_unreachable();
    for (std::size_t p = 0; p < pairs; ++p) {
      for (int b = 0; b < 4; ++b) {
        const float value = value_of((b & 1) != 0, peers.scales[2 * p]);
        sums[p][b] = 2 * p + 1 < peers.count ? value + value_of((b & 2) != 0, peers.scales[2 * p + 1]) : value;
      }
    }
  }
  /// No sum of ranks exceeds that of their scales, added in the same order: rounding is monotonous.
  float most() const noexcept {
    float sum = sums[0][3];
    for (std::size_t p = 1; p < pairs; ++p) sum += sums[p][3];
    return sum;
  }
};

/// Rows whose bits are brought side by side at once: a cache line of every rank's.
inline constexpr std::size_t kRows = 8;
/// Every rank's bits are a slow stream of their own, which hardware does not prefetch in time.
inline constexpr std::size_t kBitsAhead = 512;

/// Words of two bits per element, those of a pair's two ranks: in memory, where broadcasts cost nothing.
using Words = std::uint64_t[kRows][kPairs + 1][2];

[[gnu::always_inline]] inline void interleave(const Peers& peers, std::size_t i, std::size_t rows, Words& words) noexcept {
  constexpr std::uint64_t kEven = 0x5555555555555555u, kOdd = 0xaaaaaaaaaaaaaaaau;
  const std::size_t at = peers.offset + i / 8, even = peers.count & ~std::size_t(1);
  for (std::size_t r = 0; r < even; r += 2) {
    const std::uint8_t* const first = peers.bits[r] + at;
    const std::uint8_t* const second = peers.bits[r + 1] + at;
    __builtin_prefetch(first + kBitsAhead);
    __builtin_prefetch(second + kBitsAhead);
    std::uint64_t(*out)[2] = &words[0][r / 2];
    for (std::size_t row = 0; row < rows; ++row, out += kPairs + 1) {
      const std::uint64_t a = word_at(first + 8 * row), b = word_at(second + 8 * row);
      (*out)[0] = _pdep_u64(a, kEven) | _pdep_u64(b, kOdd);
      (*out)[1] = _pdep_u64(a >> 32, kEven) | _pdep_u64(b >> 32, kOdd);
    }
  }
  if (even == peers.count) return;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::uint64_t a = word_at(peers.bits[even] + at + 8 * row);
    words[row][even / 2][0] = _pdep_u64(a, kEven);
    words[row][even / 2][1] = _pdep_u64(a >> 32, kEven);
  }
}

template <class L, DType dtype, Write write>
[[gnu::always_inline]] inline void put(void* out, std::size_t at, typename L::V mean) noexcept {
  if constexpr (dtype == DType::bf16) L::store_bf16(static_cast<std::uint16_t*>(out) + at, L::nearest_bf16(mean));
  if constexpr (dtype == DType::fp16) L::store_fp16(static_cast<std::uint16_t*>(out) + at, mean);
  if constexpr (dtype == DType::fp32) {
    float* p = static_cast<float*>(out) + at;
    if constexpr (write == Write::plain) L::store(p, mean);
    if constexpr (write == Write::halves) L::stream_halves(p, mean);
    if constexpr (write == Write::streaming) L::template store_out<true>(p, mean);
  }
}

/// Where the masks, the product and the rounding are the same however the sums came about: vectors sum[0..count) from element i on.
template <class L, DType dtype, Write write>
[[gnu::always_inline]] inline void finish(const Peers& peers, std::size_t i, std::size_t count, typename L::V* sum, typename L::V factor,
                                          void* out) noexcept {
  for (std::size_t j = 0; j < count; ++j) sum[j] *= factor;
  if (peers.live != nullptr) [[unlikely]] {
    for (std::size_t j = 0; j < count; ++j) {
      const std::size_t at = i + j * L::kWidth;
      sum[j] = L::choose(L::mask_of(word_at(peers.live + at / kRow * 8) >> at % kRow), sum[j], L::set(0.0f));
    }
  }
  for (std::size_t j = 0; j < count; ++j) put<L, dtype, write>(out, i + j * L::kWidth, sum[j]);
}

/// Ranks whose bits are brought together in one byte per element.
inline constexpr std::size_t kTogether = 8;

/// Byte of element e: bit k is that of rank first + k. Bytes of sixteen neighbouring elements lie together; sixteen after sixteen lie where
/// `byte_of` says, since registers are zipped 16 bytes by 16 bytes. 8·kBytes elements. About a sixth of an instruction per element and
/// rank, where pdep took half of one.
template <class L>
void bring_together(const Peers& peers, std::size_t first, std::size_t i, std::uint8_t* out) noexcept {
  typename L::Bytes x[kTogether];
  for (std::size_t k = 0; k < kTogether; ++k) {
    x[k] = typename L::Bytes{};
    if (first + k >= peers.count) continue;
    const std::uint8_t* const bits = peers.bits[first + k] + peers.offset + i / 8;
    __builtin_prefetch(bits + kBitsAhead);
    x[k] = L::load_bytes(bits);
  }
  // Bit q of register r becomes bit r of register q.
  for (std::size_t k : {0, 1, 2, 3}) L::template swap_bits<4>(x[k], x[k + 4], 0x0f);
  for (std::size_t k : {0, 1, 4, 5}) L::template swap_bits<2>(x[k], x[k + 2], 0x33);
  for (std::size_t k : {0, 2, 4, 6}) L::template swap_bits<1>(x[k], x[k + 1], 0x55);
  // Byte i of register q is element 8i + q.
  typename L::Bytes y[kTogether], z[kTogether];
  for (std::size_t k = 0; k < 4; ++k) {
    y[k] = L::template zip<1, false>(x[2 * k], x[2 * k + 1]);
    y[k + 4] = L::template zip<1, true>(x[2 * k], x[2 * k + 1]);
  }
  for (std::size_t k : {0, 2, 4, 6}) {
    z[k] = L::template zip<2, false>(y[k], y[k + 1]);
    z[k + 1] = L::template zip<2, true>(y[k], y[k + 1]);
  }
  for (std::size_t h : {0, 4}) {
    for (std::size_t k : {0, 1}) {
      L::store_bytes(out + (h + 2 * k) * L::kBytes, L::template zip<4, false>(z[h + k], z[h + k + 2]));
      L::store_bytes(out + (h + 2 * k + 1) * L::kBytes, L::template zip<4, true>(z[h + k], z[h + k + 2]));
    }
  }
}

template <class L>
constexpr std::size_t byte_of(std::size_t e) noexcept {
  return e % 128 / 16 * L::kBytes + e / 128 * 16 + e % 16;
}

/// Whole runs of 8·kBytes elements of five ranks and more. @returns the elements done.
template <class L, DType dtype, Write write>
std::size_t decode_together(const Peers& peers, const PairTables& tables, std::size_t count, float factor, void* out) {
  using V = typename L::V;
  constexpr std::size_t kRun = 8 * L::kBytes, kVectors = 4, kStep = kVectors * L::kWidth;
  const std::size_t groups = (peers.count + kTogether - 1) / kTogether, whole = count / kRun * kRun;
  const V f = L::set(factor);
  alignas(64) std::uint8_t bytes[2 * kPairs / kTogether][kRun];
  alignas(64) float four[16];  // sums of the first two pairs
  for (unsigned b = 0; b < 16; ++b) four[b] = tables.sums[0][b & 3] + tables.sums[1][b >> 2];
  for (std::size_t run = 0; run < whole; run += kRun) {
    for (std::size_t g = 0; g < groups; ++g) bring_together<L>(peers, g * kTogether, run, bytes[g]);
    for (std::size_t e = 0; e < kRun; e += kStep) {
      V sum[kVectors];
      typename L::Indices index[kVectors];
      const auto load = [&](std::size_t g) {
        const std::uint8_t* const from = bytes[g] + byte_of<L>(e);
        for (std::size_t j = 0; j < kVectors; ++j) index[j] = L::indices(from + byte_of<L>(j * L::kWidth));
      };
      const auto add = [&](std::size_t p) {
        const V table = L::table(tables.sums[p]);
        for (std::size_t j = 0; j < kVectors; ++j) sum[j] += L::look_up(table, index[j]);
      };
      const auto next = [&] {
        for (std::size_t j = 0; j < kVectors; ++j) index[j] = L::template shift<2>(index[j]);
      };
      load(0);
      if constexpr (L::kSixteen) {
        for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::look_up_sixteen(four, index[j]);
        for (std::size_t j = 0; j < kVectors; ++j) index[j] = L::template shift<4>(index[j]);
      } else {
        const V table = L::table(tables.sums[0]);
        for (std::size_t j = 0; j < kVectors; ++j) sum[j] = L::look_up(table, index[j]);
        next();
        add(1);
        next();
      }
      add(2);
      if (tables.pairs > 3) {
        next();
        add(3);
      }
      for (std::size_t g = 1; g < groups; ++g) {
        load(g);
        const std::size_t end = std::min(tables.pairs, 4 * g + 4);
        for (std::size_t p = 4 * g; p < end; ++p) {
          add(p);
          next();
        }
      }
      finish<L, dtype, write>(peers, run + e, kVectors, sum, f, out);
    }
  }
  return whole;
}

/// What is left of whole rows; all of them for up to four ranks, where words of pairs cost less than bringing eight together.
template <class L, DType dtype, Write write>
void decode_rows(const Peers& peers, const PairTables& tables, std::size_t count, float factor, void* out) {
  using V = typename L::V;
  constexpr std::size_t kVectors = kRow / L::kWidth, kSteps = 16 / L::kWidth;
  const std::size_t whole = count / kRow, pairs = tables.pairs;
  const std::size_t done = pairs > 2 ? decode_together<L, dtype, write>(peers, tables, count, factor, out) : 0;
  const V f = L::set(factor);
  Words words;
  for (std::size_t first = done / kRow; first < whole; first += kRows) {
    const std::size_t rows = std::min(kRows, whole - first);
    interleave(peers, first * kRow, rows, words);
    for (std::size_t row = 0; row < rows; ++row) {
      V sum[kVectors];
      const auto values = [&](std::size_t p, auto&& take) {
        const V table = L::table(tables.sums[p]);
        for (std::size_t j = 0; j < kVectors; ++j) take(sum[j], L::look_up(table, words[row][p], j / kSteps, j % kSteps));
      };
      values(0, [](V& into, const V& value) { into = value; });
      for (std::size_t p = 1; p < pairs; ++p) values(p, [](V& into, const V& value) { into += value; });
      finish<L, dtype, write>(peers, (first + row) * kRow, kVectors, sum, f, out);
    }
  }
}

template <class L, DType dtype>
bool decode(const Peers& peers, std::size_t count, float factor, void* out, bool streaming) {
  if (peers.count > 2 * kPairs) return decode_range(peers, 0, count, factor, dtype, out);
  const PairTables tables(peers);
  const float most = tables.most() * factor;
  const bool finite = dtype == DType::fp32   ? is_finite(most)
                      : dtype == DType::bf16 ? is_finite(bf16_to_float(float_to_bf16(most)))
                                             : magnitude(most) < 65520.0f;
  if (!finite) return decode_range(peers, 0, count, factor, dtype, out);  // it looks at every element
  const auto place = reinterpret_cast<std::uintptr_t>(out);
  if (dtype == DType::fp32 && streaming && place % (4 * L::kWidth) == 0) {
    decode_rows<L, dtype, Write::streaming>(peers, tables, count, factor, out);
  } else if (dtype == DType::fp32 && streaming && place % (2 * L::kWidth) == 0) {
    decode_rows<L, dtype, Write::halves>(peers, tables, count, factor, out);
  } else {
    decode_rows<L, dtype, Write::plain>(peers, tables, count, factor, out);
  }
  return decode_range(peers, count / kRow * kRow, count, factor, dtype, out);
}

template <class L>
constexpr Kernels make_kernels() noexcept {
  Kernels out{};
  out.encode =
      for_all_scales<EncodeKernel>([]<Scale scale, Form form, DType dtype>() -> EncodeKernel { return encode<L, scale, form, dtype>; });
  out.commit = for_estimates<CommitKernel>([]<Form form, DType dtype>() -> CommitKernel { return commit<L, form, dtype>; });
  out.leave = leave<L>;
  out.fence = [] { _mm_sfence(); };
  out.decode = {decode<L, DType::fp32>, decode<L, DType::bf16>, decode<L, DType::fp16>};
  return out;
}

}  // namespace
}  // namespace thinwire::sign
