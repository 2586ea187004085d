#pragma once
// The vector twin of topk_scalar.cpp, once for all widths. Only an ISA's own file includes it, under its target pragma, after every other
// header. L is that file's vocabulary of one vector of kWidth floats; masks are L::Mask.

#include "compressors/core/prefetch.hpp"
#include "compressors/feedback/feedback_math.hpp"

namespace thinwire::topk {
namespace {

/// A block's coefficients as vectors.
template <class L>
struct Factors {
  using V = typename L::V;
  V grad, rate, keep, fresh;
  explicit Factors(const Block& b) noexcept : grad(L::set(b.factor)), rate(L::set(b.rate)), keep(L::set(b.keep)), fresh(L::set(b.fresh)) {}
};

/// Vectors of consecutive elements between load and store.
template <class L, Form form, DType dtype>
struct Group {
  using V = typename L::V;
  using Mask = typename L::Mask;
  static constexpr int kVectors = 4;
  static constexpr std::uint32_t kElements = kVectors * L::kWidth;

  V x[kVectors], u[kVectors], kept[kVectors], estimate[kVectors], average[kVectors];  // what the form has
  Mask hit[kVectors];

  /// @returns bit j for every element j that is a hit or not finite.
  [[gnu::always_inline]] inline std::uint64_t update(const Block& b, std::uint32_t i, const Factors<L>& factors,
                                                     const V& threshold) noexcept {
    std::uint64_t hits = 0;
    prefetch_ahead<kElements * size_of(dtype)>(static_cast<const std::byte*>(b.grad) + i * size_of(dtype));
    if constexpr (feedback::has_residual(form)) prefetch_ahead<kElements * 4>(b.residual + i);
    if constexpr (feedback::has_momentum(form)) prefetch_ahead<kElements * 4>(b.momentum + i);
    if constexpr (feedback::has_estimate(form)) prefetch_ahead<kElements * 4>(b.estimate + i);
    if constexpr (feedback::is_smoothed(form)) prefetch_ahead<kElements * 4>(b.average + i);
    for (int j = 0; j < kVectors; ++j) {
      const std::uint32_t at = i + std::uint32_t(j) * L::kWidth;
      V g = L::template load_grad<dtype>(b.grad, at) * factors.grad;
      V residual{};
      if constexpr (feedback::has_residual(form)) residual = L::load(b.residual + at);
      if constexpr (feedback::has_momentum(form)) u[j] = L::load(b.momentum + at);
      if constexpr (feedback::has_estimate(form)) {
        if constexpr (feedback::is_smoothed(form))
          average[j] = g = feedback::average(factors.keep, factors.fresh, L::load(b.average + at), g);
        estimate[j] = L::load(b.estimate + at);
        feedback::estimate_message<form>(g, factors.rate, estimate[j], residual, x[j]);
        kept[j] = feedback::is_control(form) && b.narrow ? L::round_bf16(residual) : residual;
      } else {
        feedback::message<form>(g, factors.rate, residual, u[j], x[j]);
        kept[j] = x[j];
      }
      hit[j] = L::not_less(L::abs(x[j]), threshold);
      hits |= std::uint64_t(L::bits(hit[j])) << (std::uint32_t(j) * L::kWidth);
    }
    return hits;
  }
  /// Whether elements must be looked at one by one. A gradient that is not finite makes x so: the state always is.
  [[gnu::always_inline]] inline bool needs_care() const noexcept {
    const V limit = L::set(feedback::has_estimate(form) ? feedback::kAmple : bits_float(0x7f800000u));
    V most = L::abs(x[0]);
    for (int j = 0; j < kVectors; ++j) {
      most = L::larger_bits(most, L::abs(x[j]));
      if constexpr (feedback::has_estimate(form)) most = L::larger_bits(most, L::abs(estimate[j]));
      if constexpr (feedback::is_control(form)) most = L::larger_bits(most, L::abs(kept[j]));
    }
    return L::any(L::not_less(most, limit));
  }
  /// What is kept if nothing is sent.
  [[gnu::always_inline]] inline void store(const Block& b, std::uint32_t i) const noexcept {
    if (feedback::has_estimate(form) && !b.clear) return;
    for (int j = 0; j < kVectors; ++j) {
      const std::uint32_t at = i + std::uint32_t(j) * L::kWidth;
      if constexpr (feedback::has_residual(form)) L::store(b.residual + at, kept[j]);
      if constexpr (feedback::has_momentum(form)) L::store(b.momentum + at, u[j]);
      if constexpr (feedback::is_smoothed(form)) L::store(b.average + at, average[j]);
    }
  }
};

/// What is emitted of a hit: x itself (fp32 on the wire, or candidates), or x rounded.
enum class Emit { exact, bf16, fp16 };

/// Emits hits whose state holds the whole message still, and leaves there what the wire cuts off. `messages`: those of elements from
/// `first` on, of forms with an estimate, whose state does not hold them.
template <class L, Form form, DType dtype>
void settle(const Block& b, const std::uint16_t* hits, std::uint32_t count, const float* messages, std::uint32_t first,
            Emitted& emitted) noexcept {
  std::uint16_t* __restrict const index = b.index + emitted.count;
  float* __restrict const value = b.value + emitted.count;
  float* __restrict const residual = b.residual;
  float* __restrict const momentum = b.momentum;
  emitted.count += count;
  std::memcpy(index, hits, 2 * count);
  if constexpr (feedback::has_estimate(form)) {
    for (std::uint32_t j = 0; j < count; ++j) value[j] = messages[hits[j] - first];
  } else if constexpr (!feedback::has_residual(form)) {
    const float factor = b.factor;
    const void* grad = b.grad;
    for (std::uint32_t j = 0; j < count; ++j) value[j] = load_element<dtype>(grad, hits[j]) * factor;
  } else if (b.clear && b.wire == DType::fp32) {
    for (std::uint32_t j = 0; j < count; ++j) {
      value[j] = residual[hits[j]];
      residual[hits[j]] = 0;
    }
  } else {
    for (std::uint32_t j = 0; j < count; ++j) value[j] = residual[hits[j]];
  }
  if (!b.clear) return;
  if constexpr (feedback::has_momentum(form)) {
    if (b.mask) {
      for (std::uint32_t j = 0; j < count; ++j) momentum[hits[j]] = 0;
    }
  }
  if constexpr (feedback::has_estimate(form)) {
    for (std::uint32_t j = 0; j < count && b.wire != DType::fp32; j += L::kWidth) {
      const auto x = L::load(value + j);
      L::store(value + j, b.wire == DType::bf16 ? L::round_bf16(x) : L::round_fp16(x));
    }
    for (std::uint32_t j = 0; j < count && b.grid; ++j) value[j] = feedback::to_grid(value[j], b.estimate[hits[j]]);
    float none = 0;
    for (std::uint32_t j = 0; j < count; ++j)
      feedback::send(value[j], feedback::has_residual(form) ? residual[hits[j]] : none, b.estimate[hits[j]]);
    return;
  }
  if (b.wire == DType::fp32) return;
  for (std::uint32_t j = 0; j < count; j += L::kWidth) {  // the last vector reaches into the staging's slack
    const auto x = L::load(value + j);
    const auto w = b.wire == DType::bf16 ? L::round_bf16(x) : L::round_fp16(x);
    typename L::V left;
    feedback::leave(x, w, left);
    L::store(value + j, w);
    if constexpr (feedback::has_residual(form)) {
      float rest[L::kWidth];
      L::store(rest, left);
      const std::uint32_t lanes = count - j < L::kWidth ? count - j : L::kWidth;
      for (std::uint32_t lane = 0; lane < lanes; ++lane) residual[hits[j + lane]] = rest[lane];
    }
  }
}

/// Elements between two settlings: their gradient and state are in L1 still.
inline constexpr std::uint32_t kChunk = 512;

/// Hits as a bitmap, for payloads of that form: one bit per element of whole groups.
template <std::uint32_t kElements>
[[gnu::always_inline]] inline void note(const Block& b, std::uint32_t i, std::uint64_t bits) noexcept {
  if (b.bitmap != nullptr) std::memcpy(b.bitmap + i / 32, &bits, kElements / 8);
}

/// For few hits: their offsets are collected, and a chunk is settled while it is in L1. kSlots = 0 branches on a group that has any; kSlots
/// > 0 writes that many offsets of every group without asking and branches only for more, so that at about a percent there is nothing to
/// mispredict. Reads gradient and state once and writes state once (DGC 12 and 8 bytes per element with fp32 gradients, EF14 8 and 4); per
/// hit 8 bytes of staging and the state's lines again from L1. Bit-exact: entries in index order.
template <class L, Form form, DType dtype, int kSlots>
void collect(const Block& b, Emitted& emitted) {
  if (b.live != nullptr) return range_kernel(form, dtype)(b, 0, b.count, emitted);
  using G = Group<L, form, dtype>;
  const Factors<L> factors(b);
  const auto threshold = L::set(b.threshold);
  const std::uint32_t whole = b.count / G::kElements * G::kElements;
  std::uint16_t hits[kChunk + 64];
  float messages[feedback::has_estimate(form) ? kChunk : 1];
  bool usable = true;  // the bitmap: not where elements were looked at one by one
  for (std::uint32_t i = 0; i < whole;) {
    const std::uint32_t begin = i, end = whole - i < kChunk ? whole : i + kChunk;
    std::uint16_t* next = hits;
    const auto settle_hits = [&]() __attribute__((always_inline)) {
      const auto found = std::uint32_t(next - hits), room = b.room - emitted.count;
      emitted.hits += found;
      settle<L, form, dtype>(b, hits, found < room ? found : room, messages, begin, emitted);
      next = hits;
    };
    for (; i < end; i += G::kElements) {
      G group;
      std::uint64_t bits = group.update(b, i, factors, threshold);
      // A message is a hit where it is not finite; those of other forms may need care without one.
      if ((kSlots != 0 || feedback::has_estimate(form) || bits != 0) && group.needs_care()) [[unlikely]] {
        settle_hits();
        range_kernel(form, dtype)(b, i, i + G::kElements, emitted);
        usable = false;
        continue;
      }
      group.store(b, i);
      if (feedback::has_estimate(form) && (kSlots != 0 || bits != 0))
        for (int j = 0; j < G::kVectors; ++j) L::store(messages + (i - begin) + std::uint32_t(j) * L::kWidth, group.x[j]);
      note<G::kElements>(b, i, bits);
      if constexpr (kSlots == 0) {
        for (; bits != 0; bits &= bits - 1) *next++ = std::uint16_t(i + L::first_bit(bits));
      } else {
        std::uint16_t* const after = next + __builtin_popcountll(bits);
        for (int slot = 0; slot < kSlots; ++slot, bits &= bits - 1) L::store_offset(next + slot, i + L::first_bit(bits));
        for (next += kSlots; bits != 0; bits &= bits - 1) *next++ = std::uint16_t(i + L::first_bit(bits));
        next = after;
      }
    }
    settle_hits();
  }
  emitted.noted = usable ? whole : 0;
  range_kernel(form, dtype)(b, whole, b.count, emitted);
}

/// For many hits: every vector's are packed and cleared before the state is stored, the same work at every density and the same bits as
/// collect.
template <class L, Form form, DType dtype, Emit kind>
void pack_as(const Block& b, Emitted& emitted) {
  using G = Group<L, form, dtype>;
  const Factors<L> factors(b);
  const auto threshold = L::set(b.threshold);
  const auto clear = L::lanes(b.clear), clear_momentum = L::lanes(b.clear && b.mask);
  std::uint32_t i = 0, count = emitted.count;
  bool usable = true;  // the bitmap: not where something was not finite
  for (; i + G::kElements <= b.count; i += G::kElements) {
    G group;
    const std::uint64_t bits = group.update(b, i, factors, threshold);
    note<G::kElements>(b, i, bits);
    const bool care = group.needs_care();
    if (care || count + G::kElements > b.room) [[unlikely]] {
      if (count == b.room && !care) {
        emitted.hits += std::uint32_t(__builtin_popcountll(bits));
        group.store(b, i);
      } else {
        emitted.hits += count - emitted.count;
        emitted.count = count;
        range_kernel(form, dtype)(b, i, i + G::kElements, emitted);
        count = emitted.count;
        if (care) usable = false;
      }
      continue;
    }
    for (int j = 0; j < G::kVectors; ++j) {
      auto w = group.x[j];
      if constexpr (kind == Emit::bf16) w = L::round_bf16(w);
      if constexpr (kind == Emit::fp16) w = L::round_fp16(w);
      if constexpr (kind == Emit::exact && feedback::has_estimate(form))
        if (b.grid && b.clear) w = L::round_bf16(group.estimate[j] + w) - group.estimate[j];
      count += L::pack(group.hit[j], i + std::uint32_t(j) * L::kWidth, w, b.index + count, b.value + count);
      if constexpr (feedback::has_estimate(form)) {  // stored where something is sent, that is nowhere else than under `clear`
        group.kept[j] = L::choose(group.hit[j], group.kept[j] - w, group.kept[j]);
        group.estimate[j] = L::choose(group.hit[j], group.estimate[j] + w, group.estimate[j]);
        if (b.clear) L::store(b.estimate + i + std::uint32_t(j) * L::kWidth, group.estimate[j]);
      } else if constexpr (kind == Emit::exact) {
        group.kept[j] = L::zero_where(L::both(group.hit[j], clear), group.x[j]);
      } else {
        typename L::V left;
        feedback::leave(group.x[j], w, left);
        group.kept[j] = L::choose(group.hit[j], left, group.x[j]);
      }
      if constexpr (feedback::has_momentum(form)) group.u[j] = L::zero_where(L::both(group.hit[j], clear_momentum), group.u[j]);
    }
    group.store(b, i);
  }
  emitted.hits += count - emitted.count;
  emitted.count = count;
  emitted.noted = usable ? i : 0;
  range_kernel(form, dtype)(b, i, b.count, emitted);
}

template <class L, Form form, DType dtype>
void pack(const Block& b, Emitted& emitted) {
  if (b.live != nullptr) return range_kernel(form, dtype)(b, 0, b.count, emitted);
  if (!b.clear || b.wire == DType::fp32) return pack_as<L, form, dtype, Emit::exact>(b, emitted);
  if (b.wire == DType::bf16) return pack_as<L, form, dtype, Emit::bf16>(b, emitted);
  pack_as<L, form, dtype, Emit::fp16>(b, emitted);
}

/// |x| bits of kWidth elements from i on; 0 for messages that overflow.
template <class L, Form form, DType dtype>
[[gnu::always_inline]] inline void magnitudes_at(const Block& s, std::size_t i, const Factors<L>& factors, std::uint32_t* out) noexcept {
  using V = typename L::V;
  const V infinity = L::set(bits_float(0x7f800000u));
  V residual{}, u{}, x;
  if constexpr (feedback::has_residual(form)) residual = L::load(s.residual + i);
  if constexpr (feedback::has_momentum(form)) u = L::load(s.momentum + i);
  V g = L::template load_grad<dtype>(s.grad, i) * factors.grad;
  const auto news = L::not_less(L::abs(g), infinity);
  if constexpr (feedback::has_estimate(form)) {
    const V estimate = L::load(s.estimate + i);
    g = L::choose(news, estimate, g);
    V average{};
    if constexpr (feedback::is_smoothed(form)) average = g = feedback::average(factors.keep, factors.fresh, L::load(s.average + i), g);
    feedback::estimate_message<form>(g, factors.rate, estimate, residual, x);
    const V most = L::larger_bits(L::abs(residual), L::abs(average));  // an element that sits out has no message
    x = L::zero_where(L::not_less(most, infinity), x);
  } else {
    g = L::zero_where(news, g);
    feedback::message<form>(g, factors.rate, residual, u, x);
  }
  const V a = L::abs(x);
  L::store(reinterpret_cast<float*>(out), L::zero_where(L::not_less(a, infinity), a));
}

/// Reads the sampled cache lines of gradient and state, writes 4 bytes per sampled element. Bit-exact.
template <class L, Form form, DType dtype>
std::size_t sample(const Block& s, std::uint64_t draw, std::uint32_t* magnitudes) {
  if (s.live != nullptr) return kernels_scalar().sample[std::size_t(form)][std::size_t(dtype)](s, draw, magnitudes);
  const Factors<L> factors(s);
  if (sample_size(s.count) == s.count) {  // all of it, in order
    const std::size_t whole = s.count / L::kWidth * L::kWidth;
    for (std::size_t i = 0; i < whole; i += L::kWidth) magnitudes_at<L, form, dtype>(s, i, factors, magnitudes + i);
    Block tail = s;
    tail.grad = static_cast<const std::byte*>(s.grad) + whole * size_of(dtype);
    if constexpr (feedback::has_residual(form)) tail.residual += whole;
    if constexpr (feedback::has_momentum(form)) tail.momentum += whole;
    if constexpr (feedback::has_estimate(form)) tail.estimate += whole;
    if constexpr (feedback::is_smoothed(form)) tail.average += whole;
    tail.count -= std::uint32_t(whole);
    return whole + kernels_scalar().sample[std::size_t(form)][std::size_t(dtype)](tail, draw, magnitudes + whole);
  }
  SampleGroups groups(s.count, draw);
  constexpr std::uint64_t kGroups = 64;  // groups whose lines are on their way to L2: no hardware prefetcher knows the hash
  std::size_t ring[kGroups];
  const auto ask = [&](std::uint64_t j) {
    const std::size_t first = ring[j % kGroups] = groups.next();
    __builtin_prefetch(static_cast<const std::byte*>(s.grad) + first * size_of(dtype), 0, 2);
    if constexpr (feedback::has_residual(form)) __builtin_prefetch(s.residual + first, 0, 2);
    if constexpr (feedback::has_momentum(form)) __builtin_prefetch(s.momentum + first, 0, 2);
    if constexpr (feedback::has_estimate(form)) __builtin_prefetch(s.estimate + first, 0, 2);
    if constexpr (feedback::is_smoothed(form)) __builtin_prefetch(s.average + first, 0, 2);
  };
  for (std::uint64_t j = 0; j < kGroups && j < groups.taken(); ++j) ask(j);
  for (std::uint64_t j = 0; j < groups.taken(); ++j) {
    const std::size_t first = ring[j % kGroups];
    if (j + kGroups < groups.taken()) ask(j + kGroups);
    for (std::size_t i = 0; i < kSampleGroup; i += L::kWidth)
      magnitudes_at<L, form, dtype>(s, first + i, factors, magnitudes + j * kSampleGroup + i);
  }
  return sample_size(s.count);
}

template <class L>
void narrow(const float* values, std::size_t count, DType wire, std::byte* out) {
  std::size_t i = 0;
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  if (wire == DType::bf16) {
    for (; i + L::kWidth <= count; i += L::kWidth) L::store_bf16(half + i, L::load(values + i));
  } else if (wire == DType::fp16) {
    for (; i + L::kWidth <= count; i += L::kWidth) L::store_fp16(half + i, L::load(values + i));
  }
  kernels_scalar().narrow(values + i, count - i, wire, out + i * size_of(wire));
}

/// Reads the tile from L1, writes it as zero and the output once, past the caches where it is large. Bit-exact.
template <class L, DType dtype, bool streaming>
bool finish_as(float* tile, std::size_t count, float factor, std::byte* out) {
  using V = typename L::V;
  constexpr std::size_t kStep = L::kWidth * size_of(dtype);
  const std::size_t head = std::min(count, (kStep - reinterpret_cast<std::uintptr_t>(out) % kStep) % kStep / size_of(dtype));
  bool finite = kernels_scalar().finish(tile, head, factor, dtype, out, false);
  const V f = L::set(factor), zero = L::set(0.0f), infinity = L::set(bits_float(0x7f800000u));
  typename L::Mask bad = L::lanes(false);
  std::size_t i = head;
  for (; i + L::kWidth <= count; i += L::kWidth) {
    const V mean = L::load(tile + i) * f;
    L::store(tile + i, zero);
    std::byte* at = out + i * size_of(dtype);
    if constexpr (dtype == DType::fp32) {
      bad = L::either(bad, L::not_less(L::abs(mean), infinity));
      L::template store_out<streaming>(reinterpret_cast<float*>(at), mean);
    } else {
      const V rounded = dtype == DType::bf16 ? L::nearest_bf16(mean) : L::nearest_fp16(mean);
      bad = L::either(bad, L::not_less(L::abs(rounded), infinity));
      if constexpr (dtype == DType::bf16) L::store_bf16(reinterpret_cast<std::uint16_t*>(at), rounded);
      if constexpr (dtype == DType::fp16) L::store_fp16(reinterpret_cast<std::uint16_t*>(at), rounded);
    }
  }
  finite &= !L::any(bad);
  return kernels_scalar().finish(tile + i, count - i, factor, dtype, out + i * size_of(dtype), false) && finite;
}

template <class L>
bool finish(float* tile, std::size_t count, float factor, DType dtype, void* out, bool streaming) {
  auto* at = static_cast<std::byte*>(out);
  if (dtype == DType::bf16) return finish_as<L, DType::bf16, false>(tile, count, factor, at);
  if (dtype == DType::fp16) return finish_as<L, DType::fp16, false>(tile, count, factor, at);
  return streaming ? finish_as<L, DType::fp32, true>(tile, count, factor, at) : finish_as<L, DType::fp32, false>(tile, count, factor, at);
}

/// Values are spread to the lanes of their bits; the other lanes keep what they hold, also the sign of a zero. Reads bitmap, values and
/// target once, writes target once, whatever the density. Bit-exact.
template <class L, DType dtype>
std::uint32_t add_bitmap(const std::uint32_t* words, std::size_t count, const std::byte* values, std::uint32_t next, std::uint32_t capacity,
                         float* target) {
  std::size_t first = 0;
  // Whole words only, and as long as a vector of values can be loaded from anywhere in the word.
  for (; first + 32 <= count && std::size_t(next) + 32 + L::kWidth <= capacity; first += 32) {
    const std::uint32_t word = words[first / 32];
    for (std::uint32_t lane = 0; lane < 32; lane += L::kWidth) {
      // Counted from the word's start: lanes of one word do not wait for each other.
      const std::uint32_t before = std::uint32_t(__builtin_popcount(word & ((std::uint32_t(1) << lane) - 1)));
      const auto value = L::template load_grad<dtype>(values, next + before);
      L::add_where(word >> lane, value, target + first + lane);
    }
    next += std::uint32_t(__builtin_popcount(word));
  }
  return kernels_scalar().add_bitmap[std::size_t(dtype)](words + first / 32, count - first, values, next, capacity, target + first);
}

template <class L>
constexpr Kernels make_kernels(const std::array<std::array<float, feedback::kGradientForms>, kTiers - 1>& crossover) noexcept {
  Kernels out{};
  const auto fill = [&]<std::size_t f, DType dtype>() {
    constexpr auto form = Form(f);
    constexpr auto d = std::size_t(dtype);
    out.stream[0][f][d] = collect<L, form, dtype, 0>;
    out.stream[1][f][d] = collect<L, form, dtype, L::kSlots>;
    out.stream[2][f][d] = pack<L, form, dtype>;
    out.sample[f][d] = sample<L, form, dtype>;
  };
  const auto fill_all = [&]<std::size_t... form>(std::index_sequence<form...>) {
    (fill.template operator()<form, DType::fp32>(), ...);
    (fill.template operator()<form, DType::bf16>(), ...);
    (fill.template operator()<form, DType::fp16>(), ...);
  };
  fill_all(std::make_index_sequence<feedback::kGradientForms>());
  out.crossover = crossover;
  out.narrow = narrow<L>;
  out.finish = finish<L>;
  out.add_bitmap = {add_bitmap<L, DType::fp32>, add_bitmap<L, DType::bf16>, add_bitmap<L, DType::fp16>};
  return out;
}

}  // namespace
}  // namespace thinwire::topk
