#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>

#include "collectives/reducer_impl.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {

void GradientReducer::Impl::describe_optimizer(std::string words, FreezeSteps steps) {
  const std::lock_guard lock(submit_);
  between_steps("describe_optimizer()");
  if (!freeze_steps_)
    fail(Errc::invalid_argument, "describe_optimizer() belongs to momentum_elsewhere; this reducer keeps its own momentum");
  queue_->drain();
  optimizer_ = std::move(words);
  freeze_steps_ = steps;
}

void GradientReducer::Impl::freeze(std::span<const Handover> handover) {
  const std::lock_guard lock(submit_);
  between_steps("freeze()");
  if (!recursion_.averaged) fail(Errc::invalid_argument, "freeze() belongs to target=momentum; this config's target is the gradient");
  if (freeze_steps_ && !is_frozen() && !freeze_steps_->contains(step_)) {
    std::string every;
    if (freeze_steps_->every != 0) every = ", or at one divisible by " + std::to_string(freeze_steps_->every);
    if (freeze_steps_->within > 1) every += " or one of the " + std::to_string(freeze_steps_->within - 1) + " after that";
    fail(Errc::invalid_argument, "freeze() at step " + std::to_string(step_) + ": the ranks compare at step " +
                                     std::to_string(freeze_steps_->from) + " and later" + every + "; call it there");
  }
  if (!handover.empty() && handover.size() != slots_.size())
    fail(Errc::invalid_argument,
         "freeze(): " + std::to_string(handover.size()) + " parameters are handed over, there are " + std::to_string(slots_.size()));
  for (std::size_t p = 0; p < handover.size(); ++p) {
    const auto& [momentum, live, beta1] = handover[p];
    const std::string whose = "freeze(): parameter '" + slots_[p].parameter.name + "' ";
    const std::size_t numel = slots_[p].numel;
    if (!momentum.empty() && momentum.size() != numel)
      fail(Errc::invalid_argument, whose + "has " + std::to_string(numel) + " elements, its momentum " + std::to_string(momentum.size()));
    if (!live.empty() && live.size() != (numel + 7) / 8)
      fail(Errc::invalid_argument,
           whose + "needs a mask of " + std::to_string((numel + 7) / 8) + " bytes, this one has " + std::to_string(live.size()));
    if (!(beta1 >= 0 && beta1 < 1)) fail(Errc::invalid_argument, whose + "has beta1=" + std::to_string(beta1) + ", outside [0, 1)");
    if (!std::all_of(momentum.begin(), momentum.end(), [](float x) { return is_finite(x); }))
      fail(Errc::invalid_argument, whose + "has a momentum that is not finite");
  }
  finish_all();
  for (std::size_t p = 0; p < handover.size(); ++p) {
    ParameterSlot& slot = slots_[p];
    if (slot.shared_momentum == nullptr) continue;
    if (!handover[p].momentum.empty()) arena_.write(handover[p].momentum, slot.shared_momentum);
    const std::span<const std::uint8_t> live = handover[p].live;
    bool all = true;
    for (std::size_t i = 0; i < live.size(); ++i) {
      const std::uint8_t bits = slot.numel - 8 * i >= 8 ? 0xff : std::uint8_t((1u << (slot.numel % 8)) - 1);
      all &= (live[i] & bits) == bits;
    }
    slot.live.assign(live.begin(), all ? live.begin() : live.end());
    slot.beta1 = handover[p].beta1;
  }
  freeze_at_ = std::min(freeze_at_, step_);
  awaits_handover_ = false;
  plans_.clear();  // they point to the masks
}

void GradientReducer::Impl::rescale_residuals(std::span<const float> factors) {
  const std::lock_guard lock(submit_);
  between_steps("rescale_residuals()");
  if (factors.size() != slots_.size())
    fail(Errc::invalid_argument,
         "rescale_residuals(): " + std::to_string(factors.size()) + " factors for " + std::to_string(slots_.size()) + " parameters");
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    if (!(factors[p] > 0) || !is_finite(factors[p]))
      fail(Errc::invalid_argument, "rescale_residuals(): the factor of parameter '" + slots_[p].parameter.name + "' is " +
                                       std::to_string(factors[p]) + ", not a positive number");
  }
  finish_all();
  std::vector<float> values;
  const auto rescale = [&](StateArray array, std::size_t count, float factor) {
    if (!array || factor == 1) return;
    values.resize(count);
    arena_.read(array, values);
    for (float& x : values)
      if (is_finite(x * factor)) x *= factor;
    arena_.write(values, array);
  };
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    const ParameterSlot& slot = slots_[p];
    if (slot.compressible) rescale(residual_of(recursion_, slot.state), slot.numel, factors[p]);
    // What an owner lacks of the mean of all estimates is no gradient that waits.
    if (recursion_.kind != Recursion::Kind::estimate) rescale(slot.server_residual, slot.owned.count, factors[p]);
  }
  if (Watch* watch = engine_->watch()) watch->restart();
}

void GradientReducer::Impl::reset() {
  const std::lock_guard lock(submit_);
  between_steps("reset()");
  finish_all();
  if (recursion_.kind == Recursion::Kind::estimate) {  // H would be another one here than on a rank that goes on
    const Deadline deadline(*parent_, communicator_->timeout());
    compare_with_all("reset()", {step_, freeze_at_, false, false});
  }
  arena_.clear();
  if (Watch* watch = engine_->watch()) watch->forget();
  engine_->set_started(!options_.step_verdict);
  engine_->set_nonfinite_steps(0);
  engine_->forget_bytes();
  starting_step_ = flushed_step_ = false;
  bad_before_ = 0;
  blank_ = true;
  start_until_ = init_ == Init::dense ? step_ + 1 : 0;
  compressed_from_ = std::max(step_, dense_steps_);
  first_average_ = false;
  for (ParameterSlot& slot : slots_) slot.dense_now = false;
  ++epoch_;
  const std::lock_guard counters(counters_);
  traffic_at_reset_ = traffic_;
  resync_error_.reset();
}

Stats GradientReducer::Impl::stats() {
  const std::lock_guard lock(submit_);
  queue_->settle();
  engine_->wait();
  if (step_ > 0) notice_cuts(step_ - 1);  // on a GPU the engine knows of them only now
  const std::lock_guard counters(counters_);
  Stats out;
  out.step = steps_done_;
  out.payload_bytes = traffic_.payload_bytes - traffic_at_reset_.payload_bytes;
  out.wire_bytes = traffic_.wire_bytes - traffic_at_reset_.wire_bytes;
  out.dense_bytes = engine_->dense_bytes();
  out.frozen = recursion_.averaged && step_ >= freeze_at_;
  out.factor = out.wire_bytes > 0 ? out.dense_bytes / out.wire_bytes : 1.0;
  out.nonfinite_steps = engine_->nonfinite_steps();
  out.resync_error = resync_error_;
  for (std::size_t j = 0; j < arena_.arrays(); ++j) out.state_bytes += arena_.count(j) * sizeof(float);
  std::vector<float> residual;
  for (std::size_t p = 0; p < slots_.size(); ++p) {
    const ParameterSlot& slot = slots_[p];
    ParameterStats& s = out.parameters.emplace_back();
    s.name = slot.parameter.name;
    s.numel = slot.numel;
    s.reason = !pass_reasons_[p].empty() ? pass_reasons_[p]
               : !slot.compressible      ? slot.never_reason
               : dense_step_             ? "a dense step"
               : slot.dense_now          ? "dense sends no more bytes at this density and world"
                                         : "";
    s.compressed = s.reason.empty();
    s.density = s.compressed ? slot.setting.density : 1.0;
    s.kept = pass_reasons_[p].empty() ? engine_->kept()[p] : 0;
    s.grad_norm = std::sqrt(engine_->grad_norms()[p]);
    const auto norm_of = [&](StateArray at, std::size_t count) {
      double sum = 0;
      residual.resize(count);
      arena_.read(at, residual);
      for (const float x : residual) sum += double(x) * x;
      return std::sqrt(sum);
    };
    const auto norm = [&](StateArray at) { return norm_of(at, slot.numel); };
    if (slot.server_residual != nullptr) s.server_residual_norm = norm_of(slot.server_residual, slot.owned.count);
    if (const StateArray at = slot.compressible ? residual_of(recursion_, slot.state) : StateArray{}) s.residual_norm = norm(at);
    if (slot.shared_momentum != nullptr) {
      s.momentum_norm = norm(slot.shared_momentum);
      s.residual_over_momentum = *s.momentum_norm > 0 ? s.residual_norm / *s.momentum_norm : 0.0;
    }
    s.masked = slot.masked();
    if (!slot.compressible) continue;
    if (const StateArray at = estimate_of(recursion_, slot.state)) s.estimate_norm = norm(at);
    const Watch* const watch = engine_->watch();
    if (recursion_.control) {
      const WatchdogState* const watchdog = watch != nullptr ? watch->state(std::uint32_t(p)) : nullptr;
      s.eta = watchdog != nullptr && watchdog->eta > 0 ? std::min(watchdog->eta, slot.setting.eta) : slot.setting.eta;
      if (watchdog != nullptr) s.eta_cuts = watchdog->cuts;
    }
    if (watch == nullptr || !watch->seen(std::uint32_t(p)).any) continue;
    const Seen& seen = watch->seen(std::uint32_t(p));
    s.measured_delta = seen.delta;
    if (recursion_.kind == Recursion::Kind::estimate) s.stale = seen.stale;
  }
  return out;
}

void GradientReducer::Impl::notice_cuts(std::uint64_t step) {
  const Watch* const watch = recursion_.control && !cuts_noticed_ ? engine_->watch() : nullptr;
  for (std::uint32_t p = 0; watch != nullptr && p < slots_.size(); ++p) {
    const WatchdogState* const state = watch->state(p);
    if (state == nullptr || state->cuts == 0) continue;
    std::ostringstream text;
    text << "rank " << communicator_->rank() << ", after step " << step << ": the watchdog has lowered eta of '" << slots_[p].parameter.name
         << "' to " << state->eta << ", for its residual grew without bound under " << config_.feedback().name
         << ":eta=" << config_.feedback().text("eta")
         << ". It may do so again, and for other parameters: stats has eta and eta_cuts of each";
    const std::lock_guard lock(counters_);
    notice_ = text.str();
    has_notice_ = cuts_noticed_ = true;
    return;
  }
}

std::string GradientReducer::Impl::take_notice() {
  if (!has_notice_.load(std::memory_order_relaxed)) return {};
  const std::lock_guard lock(counters_);
  has_notice_ = false;
  return std::exchange(notice_, {});
}

}  // namespace thinwire
