// Rows of kPartials elements, one for each partial of the order of block_sum.hpp: loops of a known length over plain arrays, which the
// compiler turns into vectors. An element that is not live, or whose gradient is not finite, is a row's zero: no sum changes by it.
#include "compressors/core/probe.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "compressors/core/block_sum.hpp"
#include "compressors/core/clones.hpp"
#include "compressors/core/prefetch.hpp"
#include "compressors/feedback/probe_math.hpp"

namespace thinwire {
namespace {

using feedback::Form;
using feedback::ProbedElement;
using feedback::ProbedSegment;

constexpr float kNothing[kStatePiece] = {};

enum class When { before, after };  // the fused pass

/// What is added up: message; or left, stale, followed, residual.
constexpr int kSums = 4;
constexpr int sums_of(When when, Form form) noexcept { return when == When::before ? 1 : feedback::has_estimate(form) ? kSums : 2; }

/// A piece of a segment, at most kStatePiece elements: gradient and state, kNothing where there is none.
struct Piece {
  ConstBytes grad;
  std::size_t first;  ///< of the gradient's elements
  float factor;
  const std::uint8_t* live;
  std::size_t live_first;
  const float *momentum, *residual, *estimate, *average;
  std::size_t count;
};

/// The recursion with what the form says of it known to the compiler.
template <Form form>
[[gnu::always_inline]] inline Recursion shaped(const Recursion& recursion) noexcept {
  using Kind = Recursion::Kind;
  Recursion out = recursion;
  out.kind = feedback::has_estimate(form)   ? Kind::estimate
             : feedback::has_momentum(form) ? Kind::momentum_correction
             : feedback::has_residual(form) ? Kind::error_feedback
                                            : Kind::none;
  out.nesterov = form == Form::nesterov;
  out.control = feedback::is_control(form);
  out.averaged = feedback::is_averaged(form);
  return out;
}

[[gnu::always_inline]] inline void load_gradients(const Piece& piece, std::size_t at, std::size_t n, float* g) noexcept {
  const std::size_t first = piece.first + at;
  if (piece.grad.dtype == DType::fp32) {
    const float* const from = piece.grad.as<float>() + first;
    for (std::size_t j = 0; j < n; ++j) g[j] = from[j] * piece.factor;
  } else if (piece.grad.dtype == DType::bf16) {
    const std::uint16_t* const from = piece.grad.as<std::uint16_t>() + first;
    for (std::size_t j = 0; j < n; ++j) g[j] = bf16_to_float(from[j]) * piece.factor;
  } else {
    const std::uint16_t* const from = piece.grad.as<std::uint16_t>() + first;
    for (std::size_t j = 0; j < n; ++j) g[j] = fp16_to_float(from[j]) * piece.factor;
  }
}

/// kPartials elements of an array, its own or, at the end of a piece, a copy with zeros behind.
class RowOf {
 public:
  [[gnu::always_inline]] RowOf(const float* array, std::size_t at, std::size_t n) noexcept : row_(array + at) {
    if (n == kPartials) return;
    std::memcpy(copy_, row_, n * sizeof(float));
    std::memset(copy_ + n, 0, (kPartials - n) * sizeof(float));
    row_ = copy_;
  }
  [[gnu::always_inline]] float operator[](std::size_t j) const noexcept { return row_[j]; }

 private:
  const float* row_;
  float copy_[kPartials];
};

template <Form form, When when>
[[gnu::always_inline]] inline void add_row(const Recursion& recursion, const ProbedSegment& segment, const Piece& piece, std::size_t at,
                                           std::size_t n, double (*partial)[kPartials]) noexcept {
  constexpr bool estimates = feedback::has_estimate(form), smoothed = feedback::is_smoothed(form);
  constexpr bool moves = when == When::before && (feedback::has_momentum(form) || feedback::is_averaged(form));
  alignas(64) float g[kPartials];
  const std::byte* const grad = piece.grad.data + (piece.first + at) * size_of(piece.grad.dtype);
  if (piece.grad.dtype == DType::fp32) {
    prefetch_ahead<kPartials * sizeof(float)>(grad);
  } else {
    prefetch_ahead<kPartials * sizeof(std::uint16_t)>(grad);
  }
  if constexpr (moves) prefetch_ahead<kPartials * sizeof(float)>(piece.momentum + at);
  if constexpr (feedback::has_residual(form)) prefetch_ahead<kPartials * sizeof(float)>(piece.residual + at);
  if constexpr (estimates) prefetch_ahead<kPartials * sizeof(float)>(piece.estimate + at);
  if constexpr (smoothed) prefetch_ahead<kPartials * sizeof(float)>(piece.average + at);
  if (n != kPartials) std::memset(g, 0, sizeof g);
  load_gradients(piece, at, n, g);
  if (piece.live != nullptr) {
    constexpr float kNone = std::numeric_limits<float>::infinity();
    for (std::size_t j = 0; j < n; ++j) g[j] = is_live(piece.live, piece.live_first + at + j) ? g[j] : kNone;
  }
  const RowOf momentum(piece.momentum, at, n), residual(piece.residual, at, n), estimate(piece.estimate, at, n),
      average(piece.average, at, n);
  const ProbedSegment known{segment.eta, segment.beta1, smoothed};
  for (std::size_t j = 0; j < kPartials; ++j) {
    const std::uint32_t counts = is_finite(g[j]) ? ~0u : 0u;  // a mask, no branch: so the loop vectorises
    const auto value = [counts](float x) { return bits_float(float_bits(x) & counts); };
    const ProbedElement element{moves ? value(momentum[j]) : 0.0f, feedback::has_residual(form) ? value(residual[j]) : 0.0f,
                                estimates ? value(estimate[j]) : 0.0f, smoothed ? value(average[j]) : 0.0f};
    if constexpr (when == When::before) {
      const double x = feedback::probed_message(recursion, known, value(g[j]), element);
      partial[0][j] += x * x;
    } else {
      const Probe rest = feedback::probed_rest(recursion, known, value(g[j]), element);
      partial[0][j] += rest.left;
      partial[1][j] += rest.residual;
      if constexpr (estimates) {
        partial[2][j] += rest.stale;
        partial[3][j] += rest.followed;
      }
    }
  }
}

template <Form form, When when>
THINWIRE_CLONES void add_piece(const Recursion& recursion, const ProbedSegment& segment, const Piece& piece,
                               double (*partial)[kPartials]) noexcept {
  const Recursion known = shaped<form>(recursion);
  std::size_t at = 0;
  for (; at + kPartials <= piece.count; at += kPartials) add_row<form, when>(known, segment, piece, at, kPartials, partial);
  if (at < piece.count) add_row<form, when>(known, segment, piece, at, piece.count - at, partial);
}

using AddPiece = void (*)(const Recursion&, const ProbedSegment&, const Piece&, double (*)[kPartials]);

template <When when>
AddPiece choose(Form form) noexcept {
  switch (form) {
    case Form::error_feedback:
      return add_piece<Form::error_feedback, when>;
    case Form::averaged_feedback:
      return add_piece<Form::averaged_feedback, when>;
    case Form::momentum:
      return add_piece<Form::momentum, when>;
    case Form::nesterov:
      return add_piece<Form::nesterov, when>;
    case Form::estimate:
      return add_piece<Form::estimate, when>;
    case Form::smoothed_estimate:
      return add_piece<Form::smoothed_estimate, when>;
    case Form::control:
      return add_piece<Form::control, when>;
    case Form::smoothed_control:
      return add_piece<Form::smoothed_control, when>;
    case Form::none:
    case Form::averaged:
      break;  // !can_probe
  }
  return nullptr;
}

/// Adds up a segment.
template <When when>
void add_segment(const Recursion& recursion, const Segment& segment, const SegmentState& own, float factor, float beta1, ConstBytes grad,
                 double (&out)[kSums]) noexcept {
  const Form form = feedback::form_of(recursion);
  const AddPiece add_piece = choose<when>(form);
  const StateArray residual = residual_of(recursion, own), estimate = estimate_of(recursion, own);
  const float *const average = average_of(recursion, own), *const momentum = own.array[0].fp32();
  const ProbedSegment probed{feedback::limited_eta(segment.setting.eta, own.eta_limit), beta1, average != nullptr};
  double blocks[kSums][kPartials] = {};
  for (std::size_t block = 0, begin = 0; begin < segment.count; ++block, begin += kSumBlock) {
    double partial[kSums][kPartials] = {};
    const std::size_t end = std::min(segment.count, begin + kSumBlock);
    for (std::size_t i = begin; i < end; i += kStatePiece) {
      const std::size_t n = std::min(kStatePiece, end - i);
      StatePiece e(residual.from(i), n), h(estimate.from(i), n);
      e.drop(), h.drop();
      const auto there = [](const float* array) { return array != nullptr ? array : kNothing; };
      add_piece(recursion, probed,
                {grad, segment.first + i, factor, segment.live, i, momentum != nullptr ? momentum + i : kNothing, there(e.data()),
                 there(h.data()), average != nullptr ? average + i : kNothing, n},
                partial);
    }
    for (int sum = 0; sum < sums_of(when, form); ++sum) blocks[sum][block % kPartials] += add_in_halves(partial[sum]);
  }
  for (int sum = 0; sum < sums_of(when, form); ++sum) out[sum] = add_in_halves(blocks[sum]);
}

}  // namespace

bool can_probe(const Recursion& recursion) noexcept { return recursion.kind != Recursion::Kind::none; }

void probe_messages(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    double sums[kSums] = {};
    add_segment<When::before>(recursion, plan.segments[s], state.segments[s], state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f,
                              recursion.averaged ? state.beta1[s] : 0.0f, grad, sums);
    out[s] += Probe{.message = sums[0]};
  }
}

void probe_rest(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, std::span<Probe> out) noexcept {
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    double sums[kSums] = {};
    add_segment<When::after>(recursion, plan.segments[s], state.segments[s], state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f,
                             0.0f, grad, sums);
    out[s] += Probe{.left = sums[0], .stale = sums[2], .followed = sums[3], .residual = sums[1]};
  }
}

}  // namespace thinwire
