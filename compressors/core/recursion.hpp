#pragma once
// The feedback recursion as a struct of coefficients (specs: one generic recursion, many methods), and its unfused pieces that need no
// codec. The fused passes live in the codec families, which instantiate stream<Recursion, Sink>.

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "compressors/core/plan.hpp"
#include "compressors/core/span.hpp"
#include "compressors/core/stream.hpp"

namespace thinwire {

/// What a rank keeps back and adds to the next message.
///   none: message = g.                                                          No state.
///   error_feedback (EF14; decay rho): message = rho·e + g;  e ← message − sent.   State: residual (e).
///   momentum_correction (DGC):  u ← m·u + g;  v ← v + u          (Nesterov: u ← m·(u + g);  v ← v + (u + g));
///                               message = v;  v ← v − sent;  u ← 0 where something was sent, if `mask`.   State: momentum (u), accumulated
///                               (v).
/// @source EF14: Seide et al. 2014; DGC: Lin et al. 2018, momentum correction and momentum factor masking.
struct Recursion {
  enum class Kind : std::uint8_t { none, error_feedback, momentum_correction };
  Kind kind = Kind::none;
  float decay = 1.0f;      ///< error_feedback: rho in (0, 1]
  float momentum = 0.9f;   ///< momentum_correction: m in [0, 1)
  bool nesterov = false;   ///< momentum_correction
  bool mask = true;        ///< momentum_correction: momentum factor masking
  float clip_norm = 0.0f;  ///< momentum_correction, averaged: local clipping, 0 = off (see clip_factors)
  /// target=momentum: beta1·m + (1 − beta1)·g stands where g does, with the momentum m that all ranks share (1-bit Adam; none and
  /// error_feedback). m is read here; whoever applies the mean writes it.
  bool averaged = false;

  bool operator==(const Recursion&) const = default;
};

inline constexpr std::size_t kMaxStateArrays = 2;

/// Names of the state arrays of a parameter that is compressed, in the order of SegmentState::array. The last one is the residual: it holds
/// what was not sent.
std::span<const std::string_view> state_names(const Recursion& recursion) noexcept;
/// The same for a parameter that is never compressed: DGC keeps its momentum, the others nothing.
std::span<const std::string_view> dense_state_names(const Recursion& recursion) noexcept;

/// One segment's state: pointers to its first element, in the place of the plan's data.
struct SegmentState {
  std::array<float*, kMaxStateArrays>
      array{};  ///< none: {}; error_feedback: {e}; momentum_correction: {u, v}, v null where nothing is ever compressed; averaged: m first
  float* memory = nullptr;  ///< Codec::memory(segment) floats of the codec's own

  bool operator==(const SegmentState&) const = default;
};

/// Where v or e is, or null: the array into which take-backs go and which a dense step empties.
float* residual_of(const Recursion& recursion, const SegmentState& state) noexcept;

/// A plan's state, and what its gradients are multiplied by before anything else.
struct StateView {
  std::span<const SegmentState> segments;  ///< one per segment of the plan
  const float* grad_factor = nullptr;      ///< one per segment: 1 / loss scale × clip factor; null: 1
  const float* beta1 = nullptr;            ///< averaged: one per segment
};

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

}  // namespace thinwire
