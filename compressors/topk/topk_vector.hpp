#pragma once
// The vector twin of topk_scalar.cpp, once for all widths. Only an ISA's own file includes it, under its target pragma, after every other
// header. L is that file's vocabulary of one vector of kWidth floats; masks are L::Mask.

#include "compressors/feedback/feedback_math.hpp"

namespace thinwire::topk {
namespace {

/// What is emitted of a hit: x itself (fp32 on the wire, or candidates), or x rounded.
enum class Emit { exact, bf16, fp16 };

constexpr Emit emit_of(const Block& b) noexcept {
  return !b.clear || b.wire == DType::fp32 ? Emit::exact : b.wire == DType::bf16 ? Emit::bf16 : Emit::fp16;
}

/// A group of consecutive vectors between load and store.
template <class L, Form form, DType dtype, int kVectors>
struct Group {
  using V = typename L::V;
  using Mask = typename L::Mask;
  static constexpr std::uint32_t kElements = kVectors * L::kWidth;

  V x[kVectors], u[kVectors];
  Mask hit[kVectors];

  struct Constants {
    V factor, rate, threshold;
    Mask clear, clear_momentum;  // all lanes or none
    explicit Constants(const Block& b) noexcept
        : factor(L::set(b.factor)),
          rate(L::set(b.rate)),
          threshold(L::set(b.threshold)),
          clear(L::lanes(b.clear)),
          clear_momentum(L::lanes(b.clear && b.mask)) {}
  };

  [[gnu::always_inline]] inline void update(const Block& b, std::uint32_t i, const Constants& c) noexcept {
    for (int j = 0; j < kVectors; ++j) {
      const std::uint32_t at = i + std::uint32_t(j) * L::kWidth;
      const V g = L::template load_grad<dtype>(b.grad, at) * c.factor;
      V residual{};
      if constexpr (feedback::has_residual(form)) residual = L::load(b.residual + at);
      if constexpr (feedback::has_momentum(form)) u[j] = L::load(b.momentum + at);
      feedback::message<form>(g, c.rate, residual, u[j], x[j]);
      hit[j] = L::not_less(L::abs(x[j]), c.threshold);
    }
  }
  [[gnu::always_inline]] inline bool any_hit() const noexcept {
    Mask any = hit[0];
    for (int j = 1; j < kVectors; ++j) any = L::either(any, hit[j]);
    return L::any(any);
  }
  /// A gradient that is not finite makes x so: the state always is.
  [[gnu::always_inline]] inline bool any_nonfinite() const noexcept {
    const V infinity = L::set(bits_float(0x7f800000u));
    Mask any = L::not_less(L::abs(x[0]), infinity);
    for (int j = 1; j < kVectors; ++j) any = L::either(any, L::not_less(L::abs(x[j]), infinity));
    return L::any(any);
  }
  [[gnu::always_inline]] inline void store(const Block& b, std::uint32_t i) const noexcept {
    for (int j = 0; j < kVectors; ++j) {
      const std::uint32_t at = i + std::uint32_t(j) * L::kWidth;
      if constexpr (feedback::has_residual(form)) L::store(b.residual + at, x[j]);
      if constexpr (feedback::has_momentum(form)) L::store(b.momentum + at, u[j]);
    }
  }
  /// Packs the hits behind those emitted so far and stores the state without them.
  template <Emit kind>
  [[gnu::always_inline]] inline void emit(const Block& b, std::uint32_t i, const Constants& c, std::uint32_t& count) noexcept {
    for (int j = 0; j < kVectors; ++j) {
      const std::uint32_t at = i + std::uint32_t(j) * L::kWidth;
      V w = x[j];
      if constexpr (kind == Emit::bf16) w = L::round_bf16(w);
      if constexpr (kind == Emit::fp16) w = L::round_fp16(w);
      count += L::pack(hit[j], at, w, b.index + count, b.value + count);
      if constexpr (kind == Emit::exact) {
        x[j] = L::zero_where(L::both(hit[j], c.clear), x[j]);
      } else {
        V left;
        feedback::leave(x[j], w, left);
        x[j] = L::choose(hit[j], left, x[j]);
      }
      if constexpr (feedback::has_momentum(form)) u[j] = L::zero_where(L::both(hit[j], c.clear_momentum), u[j]);
    }
    store(b, i);
  }
  [[gnu::always_inline]] inline std::uint32_t hits() const noexcept {
    std::uint32_t count = 0;
    for (int j = 0; j < kVectors; ++j) count += L::count(hit[j]);
    return count;
  }
};

/// A group that the straight way does not fit: a full room, or a value that is not finite.
template <class G, Form form, DType dtype>
[[gnu::noinline]] void careful(const Block& b, std::uint32_t i, Emitted& emitted) noexcept {
  range_kernel(form, dtype)(b, i, i + G::kElements, emitted);
}

/// Tests a group for hits and stores it untouched if it has none. Reads gradient and state once, writes state once (DGC 12 and 8 bytes per
/// element with fp32 gradients, EF14 8 and 4), 6 bytes of staging per hit. Bit-exact: entries in index order.
template <class L, Form form, DType dtype>
void branchy(const Block& b, Emitted& emitted) {
  using G = Group<L, form, dtype, L::kBranchyVectors>;
  std::uint32_t i = 0;
  if (b.live == nullptr) {
    const typename G::Constants c(b);
    const Emit kind = emit_of(b);
    for (; i + G::kElements <= b.count; i += G::kElements) {
      G group;
      group.update(b, i, c);
      if (!group.any_hit()) [[likely]] {
        group.store(b, i);
        continue;
      }
      if (emitted.count + G::kElements > b.room || group.any_nonfinite()) {
        careful<G, form, dtype>(b, i, emitted);
        continue;
      }
      const std::uint32_t before = emitted.count;
      if (kind == Emit::exact) {
        group.template emit<Emit::exact>(b, i, c, emitted.count);
      } else if (kind == Emit::bf16) {
        group.template emit<Emit::bf16>(b, i, c, emitted.count);
      } else {
        group.template emit<Emit::fp16>(b, i, c, emitted.count);
      }
      emitted.hits += emitted.count - before;
    }
  }
  range_kernel(form, dtype)(b, i, b.count, emitted);
}

/// Packs every group, hits or not: the same traffic at a speed that does not depend on the density. Bit-exact with branchy.
template <class L, Form form, DType dtype, Emit kind>
void branchless_as(const Block& b, Emitted& emitted) {
  using G = Group<L, form, dtype, L::kBranchlessVectors>;
  const typename G::Constants c(b);
  std::uint32_t i = 0, count = emitted.count;
  for (; i + G::kElements <= b.count; i += G::kElements) {
    G group;
    group.update(b, i, c);
    if (group.any_nonfinite() || count + G::kElements > b.room) [[unlikely]] {
      if (count == b.room && !group.any_nonfinite()) {
        emitted.hits += group.hits();
        group.store(b, i);
      } else {
        emitted.hits += count - emitted.count;
        emitted.count = count;
        careful<G, form, dtype>(b, i, emitted);
        count = emitted.count;
      }
      continue;
    }
    group.template emit<kind>(b, i, c, count);
  }
  emitted.hits += count - emitted.count;
  emitted.count = count;
  range_kernel(form, dtype)(b, i, b.count, emitted);
}

template <class L, Form form, DType dtype>
void branchless(const Block& b, Emitted& emitted) {
  if (b.live != nullptr) return range_kernel(form, dtype)(b, 0, b.count, emitted);
  const Emit kind = emit_of(b);
  if (kind == Emit::exact) return branchless_as<L, form, dtype, Emit::exact>(b, emitted);
  if (kind == Emit::bf16) return branchless_as<L, form, dtype, Emit::bf16>(b, emitted);
  branchless_as<L, form, dtype, Emit::fp16>(b, emitted);
}

/// Reads the sampled cache lines of gradient and state, writes 4 bytes per sampled element. Bit-exact.
template <class L, Form form, DType dtype>
std::size_t sample(const Block& s, std::uint64_t step, std::uint32_t* magnitudes) {
  using V = typename L::V;
  if (s.live != nullptr || sample_size(s.count) == s.count)
    return kernels_scalar().sample[std::size_t(form)][std::size_t(dtype)](s, step, magnitudes);
  const SampleGroups groups(s.count, step);
  const V factor = L::set(s.factor), rate = L::set(s.rate), infinity = L::set(bits_float(0x7f800000u));
  constexpr std::uint64_t kAhead = 16;
  for (std::uint64_t j = 0; j < groups.taken; ++j) {
    const std::size_t later = groups.first(j + kAhead < groups.taken ? j + kAhead : j);
    __builtin_prefetch(static_cast<const std::byte*>(s.grad) + later * size_of(dtype));
    if constexpr (feedback::has_residual(form)) __builtin_prefetch(s.residual + later);
    if constexpr (feedback::has_momentum(form)) __builtin_prefetch(s.momentum + later);
    const std::size_t first = groups.first(j);
    for (std::size_t i = 0; i < kSampleGroup; i += L::kWidth) {
      V residual{}, u{}, x;
      if constexpr (feedback::has_residual(form)) residual = L::load(s.residual + first + i);
      if constexpr (feedback::has_momentum(form)) u = L::load(s.momentum + first + i);
      V g = L::template load_grad<dtype>(s.grad, first + i) * factor;
      g = L::zero_where(L::not_less(L::abs(g), infinity), g);
      feedback::message<form>(g, rate, residual, u, x);
      const V a = L::abs(x);
      L::store(reinterpret_cast<float*>(magnitudes + j * kSampleGroup + i), L::zero_where(L::not_less(a, infinity), a));
    }
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

template <class L>
constexpr Kernels make_kernels(std::array<float, feedback::kForms> crossover) noexcept {
  Kernels out{};
  const auto fill = [&]<Form form>() {
    constexpr auto f = std::size_t(form);
    out.branchy[f] = {branchy<L, form, DType::fp32>, branchy<L, form, DType::bf16>, branchy<L, form, DType::fp16>};
    out.branchless[f] = {branchless<L, form, DType::fp32>, branchless<L, form, DType::bf16>, branchless<L, form, DType::fp16>};
    out.sample[f] = {sample<L, form, DType::fp32>, sample<L, form, DType::bf16>, sample<L, form, DType::fp16>};
  };
  fill.template operator()<Form::none>();
  fill.template operator()<Form::error_feedback>();
  fill.template operator()<Form::momentum>();
  fill.template operator()<Form::nesterov>();
  out.crossover = crossover;
  out.narrow = narrow<L>;
  out.finish = finish<L>;
  return out;
}

}  // namespace
}  // namespace thinwire::topk
