#include "launch/trainer/adam.hpp"

#include "compressors/core/error.hpp"

namespace thinwire::launch {

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
  }
  if (frozen_steps_ != 0 || !freeze_at_ || reducer_.step() < *freeze_at_) return false;
  freeze();
  return true;
}

void Adam::freeze() {
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
    momenta_[i] = torch::Tensor();  // the reducer's from now on
    if (reducer_.world() == 1) continue;
    // Where gradients were rare: sqrt(v) is at least kVarianceFloor times its mean over the tensor.
    torch::Tensor& v = variances_[i];
    const torch::Tensor least = (v.sqrt().mean(torch::kDouble) * kVarianceFloor).square().to(v.scalar_type());
    v.copy_(torch::where(v > 0, torch::maximum(v, least), v));
  }
  reducer_.freeze(handover);
  frozen_steps_ = steps_;
}

}  // namespace thinwire::launch
