#pragma once
// The feedback recursion as a struct of coefficients (specs: one generic recursion, many methods), and its unfused pieces that need no
// codec. The fused passes live in the codec families, which instantiate stream<Recursion, Sink>.

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "compressors/core/plan.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/state_array.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// What a rank keeps back and adds to the next message.
///   none: message = g.                                                          No state.
///   error_feedback (EF14; decay rho): message = rho·e + g;  e ← message − sent.   State: residual (e).
///   momentum_correction (DGC):  u ← m·u + g;  v ← v + u          (Nesterov: u ← m·(u + g);  v ← v + (u + g));
///                               message = v;  v ← v − sent;  u ← 0 where something was sent, if `mask`.   State: momentum (u), accumulated
///                               (v).
///   estimate:  every rank has an estimate h of its gradient, and all have the mean H of them. With t = g − h
///                EF21:      message = t;           h ← h + sent.                       State: estimate (h), mean_estimate (H).
///                EControl:  message = eta·e + t;   h ← h + sent;   e ← e + t − sent.   State: residual (e) too.
///              H ← H + mean of what was sent, and is what comes back. With `fresh` < 1 stands v ← (1 − fresh)·v + fresh·g where g does
///              (EF21-SGDM, EControl + wM). State: average (v).
/// @source EF14: Seide et al. 2014; DGC: Lin et al. 2018, momentum correction and momentum factor masking; EF21: Richtárik et al. 2021;
/// EF21-SGDM: Fatkhullin et al. 2023; EControl: Gao et al. 2024.
struct Recursion {
  enum class Kind : std::uint8_t { none, error_feedback, momentum_correction, estimate };
  Kind kind = Kind::none;
  float decay = 1.0f;      ///< error_feedback: rho in (0, 1]
  float momentum = 0.9f;   ///< momentum_correction: m in [0, 1)
  bool nesterov = false;   ///< momentum_correction
  bool mask = true;        ///< momentum_correction: momentum factor masking
  float clip_norm = 0.0f;  ///< momentum_correction, averaged: local clipping, 0 = off (see clip_factors)
  /// target=momentum: beta1·m + (1 − beta1)·g stands where g does, with the momentum m that all ranks share (1-bit Adam; none and
  /// error_feedback). m is read here; whoever applies the mean writes it.
  bool averaged = false;
  bool control = false;  ///< estimate: EControl's residual, fed back with each segment's Setting::eta; false: EF21, which has none
  enum class Eta : std::uint8_t { automatic, theory, paper, number };
  Eta eta = Eta::automatic;  ///< control: how a segment's eta follows from its codec's contraction (eta_of)
  float given_eta = 0.0f;    ///< Eta::number
  float fresh = 1.0f;        ///< estimate: the worker average's share of the new gradient, in (0, 1]; 1 = off
  /// error_feedback, control: e is stored in bf16. It is rounded when a step's news have come in, and again where something was sent.
  bool narrow = false;
  /// estimate: h is stored in bf16, and what is sent is such that h is a bf16 number on every rank: bf16(h + x) − h, in fp32. So storing
  /// it costs nothing of H = mean h.
  bool grid = false;
  bool starting = false;  ///< estimate: a dense step that sets it (init=dense), or the first that is compressed (init=compressed)
  bool first = false;     ///< estimate: the first step that is compressed, where no dense one set the estimates: v ← g
  bool blank = false;     ///< estimate: of a dense step before anything was started: h and H are 0

  bool operator==(const Recursion&) const = default;
};

/// v ← keep·v + fresh·g
struct AverageShares {
  float keep, fresh;
};
constexpr AverageShares average_shares(const Recursion& recursion) noexcept {
  return recursion.first ? AverageShares{0.0f, 1.0f} : AverageShares{1.0f - recursion.fresh, recursion.fresh};
}

inline constexpr std::size_t kMaxStateArrays = 4;

/// Names of the state arrays of a parameter that is compressed, in the order of SegmentState::array.
std::span<const std::string_view> state_names(const Recursion& recursion) noexcept;
/// The same for a parameter that is never compressed: DGC keeps its momentum, the others nothing.
std::span<const std::string_view> dense_state_names(const Recursion& recursion) noexcept;

/// One segment's state: pointers to its first element, in the place of the plan's data.
struct SegmentState {
  /// none: {}; error_feedback: {e}; momentum_correction: {u, v}, v null where nothing is ever compressed; averaged: m first; estimate: {h,
  /// H}, then e under control, then v with a worker average.
  std::array<StateArray, kMaxStateArrays> array{};
  float* memory = nullptr;           ///< Codec::memory(segment) floats of the codec's own
  const float* eta_limit = nullptr;  ///< control: what a watchdog has lowered eta to, 0: nothing; null: there is no watchdog

  bool operator==(const SegmentState&) const = default;
};

/// How state array j of a parameter that is compressed is stored.
DType state_dtype(const Recursion& recursion, std::size_t j) noexcept;

/// Where v or e is, or null: the array into which take-backs go and which a dense step empties.
StateArray residual_of(const Recursion& recursion, const SegmentState& state) noexcept;
/// estimate: h, H and v; null for other recursions, and v where there is no worker average.
StateArray estimate_of(const Recursion& recursion, const SegmentState& state) noexcept;
float* mean_estimate_of(const Recursion& recursion, const SegmentState& state) noexcept;
float* average_of(const Recursion& recursion, const SegmentState& state) noexcept;

/// A plan's state, and what its gradients are multiplied by before anything else.
struct StateView {
  std::span<const SegmentState> segments;  ///< one per segment of the plan
  const float* grad_factor = nullptr;      ///< one per segment: 1 / loss scale × clip factor; null: 1
  const float* beta1 = nullptr;            ///< averaged: one per segment
};

/// EControl's eta for a codec of this nominal contraction delta in (0, 1], with c = sqrt(1 − delta): delta (automatic), (1 − c)/(3c)
/// (theory), delta/400 (paper), none of them above delta; or the given number.
/// @source Gao et al. 2024 (paper); Gao, Rodomanov, Rack, Stich 2025 (theory).
float eta_of(const Recursion& recursion, double delta) noexcept;

/// out = beta1·momentum + (1 − beta1)·mean, element by element: what the shared momentum becomes at a dense step before it is compressed.
/// `out` may be either.
void average_momentum(float beta1, std::span<const float> momentum, std::span<const float> mean, std::span<float> out) noexcept;

/// Bits of the word that travels in a header and makes the verdict.
enum Flag : std::uint32_t {
  kFlagNonfinite = 1,  ///< a gradient element or a message was not finite; it entered no state
  kFlagJoined = 2,     ///< this rank has no data any more: an empty payload, state untouched
};

/// norms[s] = Σ x² over the finite elements of segment s, in double, in the fixed order of block sums (DESIGN: numerics): the same bits on
/// every ISA and device.
/// @complexity reads grad once.
void squared_norms(const Plan& plan, ConstBytes grad, double* norms, Stream stream);

/// clip_norm = c: factors[s] = unscale · min(1, c·sqrt(world · n_s / total_numel) / (unscale · sqrt(norms[s]))). Without clipping every
/// factor is `unscale`.
/// @source DGC local gradient clipping, for undivided local gradients; per parameter, because a bucket's hook cannot know the model's norm.
void clip_factors(const Recursion& recursion, const Plan& plan, std::span<const double> norms, float unscale, int world,
                  std::size_t total_numel, float* factors);

/// A dense step of the recursion: the messages of the segments, one after the other in `message`, in message.dtype: fp32 where there is
/// state, fp32 or the gradient's dtype where there is none. The residual (if any) holds the message until settle_dense. Non-finite elements
/// are no news and set kFlagNonfinite in *flags.
/// @complexity reads grad and state, writes state and message, one pass.
void dense_message(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes message,
                   std::uint32_t* flags, Stream stream);

/// After a finite verdict on a dense step: residuals are empty. After any other verdict nothing needs doing: the message is still there.
void settle_dense(const Recursion& recursion, const Plan& plan, const StateView& state, Stream stream);

/// estimate, after a bad verdict on a compressed step: the estimates have advanced on all ranks, so e ← e + h, which holds what e and the
/// gradient did. EF21 has no residual: nothing happens.
void keep_news(const Recursion& recursion, const Plan& plan, const StateView& state) noexcept;

/// estimate, a dense step that is `starting`, after its verdict and before settle_dense. A finite one: h ← the message, v ← h, and H
/// becomes `means`, packed. The message of EF21, which has no residual to lie in, lies in h: after a bad
/// verdict h and H start from 0.
void start_estimates(const Recursion& recursion, const Plan& plan, const StateView& state, const float* means, bool finite) noexcept;

/// H ← H + factor · sum, and sum ← H. H stays finite: it is cut at the largest float.
void add_to_mean_estimate(float* sum, float factor, float* mean_estimate, std::size_t count) noexcept;

}  // namespace thinwire
