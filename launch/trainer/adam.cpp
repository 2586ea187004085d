#include "launch/trainer/adam.hpp"

#include <algorithm>
#include <cstdio>

#include "compressors/core/error.hpp"

namespace thinwire::launch {

namespace {

constexpr int kLookEvery = 16;  // steps between looks at the largest update on a GPU

/// The first few, and how many there are.
std::string names_of(const std::vector<std::string>& names) {
  std::string shown;
  for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 3); ++i) shown += (i == 0 ? "'" : ", '") + names[i] + "'";
  return names.size() <= 3 ? shown : shown + " and " + std::to_string(names.size() - 3) + " more";
}

}  // namespace

Adam::Adam(std::vector<torch::Tensor> parameters, GradientReducer& reducer, const Config& config, double beta2, double weight_decay)
    : parameters_(std::move(parameters)), reducer_(reducer), beta2_(beta2), decay_(weight_decay) {
  for (const torch::Tensor& p : parameters_) {
    momenta_.push_back(torch::zeros_like(p));
    variances_.push_back(torch::zeros_like(p));
  }
  if (config.target().name != "momentum") return;
  beta1_ = config.target().number("beta1");
  freeze_at_ = config.target().integer("freeze");
}

bool Adam::step(double lr) {
  const torch::NoGradGuard no_grad;
  ++steps_;
  const double step_size = lr / (1 - std::pow(beta1_, steps_));
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    torch::Tensor& p = parameters_[i];
    torch::Tensor &m = momenta_[i], &v = variances_[i];
    const bool averaged = frozen_steps_ > 0 && reducer_.averages(std::uint32_t(i));
    if (decay_ != 0) p.mul_(1 - lr * decay_);
    if (!averaged) {
      m.lerp_(p.grad(), 1 - beta1_);
      v.mul_(beta2_).addcmul_(p.grad(), p.grad(), 1 - beta2_);
    }
    const double correction = 1 - std::pow(beta2_, averaged ? frozen_steps_ : steps_);
    const torch::Tensor denominator = (v.sqrt() / std::pow(correction, 0.5)).add_(eps_);
    p.addcdiv_(averaged ? p.grad() : m, denominator, -step_size);
    if (!averaged) continue;
    const torch::Tensor largest = (p.grad() / denominator).abs_().max() / (1 - std::pow(beta1_, steps_));
    largest_ = largest_.defined() ? torch::fmax(largest_, largest) : largest;
  }
  look_at_updates(false);
  if (frozen_steps_ != 0 || !freeze_at_ || reducer_.step() < *freeze_at_) return false;
  freeze();
  return true;
}

double Adam::max_update(bool wait) {
  look_at_updates(wait);
  return max_update_;
}

void Adam::look_at_updates(bool wait) {
  if (!largest_.defined() || (++unread_ < kLookEvery && largest_.is_cuda() && !wait)) return;
  const double largest = largest_.item<double>();
  largest_.reset();
  unread_ = 0;
  if (largest > kUnusualUpdate && max_update_ <= kUnusualUpdate) {
    char number[32];
    std::snprintf(number, sizeof number, "%.3g", largest);
    notice_ += std::string("an update of ") + number + " times the learning rate by step " + std::to_string(std::int64_t(steps_)) +
               "; Adam's are about 1. The variance was frozen at step " + std::to_string(frozen_at_) +
               ", probably before it was stable where gradients are rare: freeze later, or keep such tensors dense (min_numel)";
  }
  max_update_ = std::max(max_update_, largest);
}

void Adam::freeze() {
  frozen_at_ = reducer_.step();
  const std::vector<ParameterStats> described = reducer_.stats().parameters;
  std::vector<std::string> dead;
  std::vector<torch::Tensor> kept;  // what the spans point into
  std::vector<Handover> handover(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (!reducer_.averages(std::uint32_t(i))) continue;
    const torch::Tensor m = kept.emplace_back(momenta_[i].cpu().contiguous().view(-1));
    const torch::Tensor live = (variances_[i] != 0).cpu().contiguous().view(-1);
    const torch::Tensor bits = kept.emplace_back(torch::zeros((live.numel() + 7) / 8, torch::kUInt8));
    for (std::int64_t e = 0; e < live.numel(); ++e)
      bits.data_ptr<std::uint8_t>()[e / 8] |= std::uint8_t(live.const_data_ptr<bool>()[e]) << (e % 8);
    handover[i].momentum = {m.const_data_ptr<float>(), std::size_t(m.numel())};
    handover[i].live = {bits.const_data_ptr<std::uint8_t>(), std::size_t(bits.numel())};
    handover[i].beta1 = float(beta1_);
    if (!live.any().item<bool>()) dead.push_back(described[i].name);
    momenta_[i] = torch::Tensor();  // the reducer's from now on
    if (reducer_.world() == 1) continue;
    torch::Tensor& v = variances_[i];  // where gradients were rare it is raised
    const float least = least_variance(v.sqrt().mean(torch::kDouble).item<double>());
    v.copy_(torch::where(v > 0, v.clamp_min(least), v));
  }
  if (!dead.empty())
    notice_ += "at the freeze, step " + std::to_string(frozen_at_) + ", these have had no gradient: " + names_of(dead) +
               ". Their v = 0 masks them: but for the weight decay they never move again. Freeze later, or keep them dense (min_numel)";
  reducer_.freeze(handover);
  frozen_steps_ = steps_;
}

}  // namespace thinwire::launch
