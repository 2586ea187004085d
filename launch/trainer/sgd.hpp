#pragma once
// SGD of the trainer, as it is and for DGC, operation for operation those of Python, so that both trainers reach the same bits.

#include <torch/types.h>

#include <vector>

#include "compressors/core/config.hpp"

namespace thinwire::launch {

/// torch.optim.SGD(momentum, weight_decay, dampening 0), or thinwire.optim.DGCSGD where the reducer has the momentum (feedback=dgc).
class Sgd {
 public:
  Sgd(std::vector<torch::Tensor> parameters, const Config& config, double momentum, double weight_decay)
      : parameters_(std::move(parameters)), buffers_(parameters_.size()), dgc_(config.feedback().name == "dgc"), decay_(weight_decay) {
    momentum_ = dgc_ ? config.feedback().number("momentum") : momentum;
    nesterov_ = dgc_ && config.feedback().flag("nesterov");
  }

  void step(double lr) {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (dgc_) {
        step_dgc(parameters_[i], buffers_[i], lr);
      } else {
        step_momentum(parameters_[i], buffers_[i], lr);
      }
    }
  }

 private:
  void step_momentum(torch::Tensor& p, torch::Tensor& buffer, double lr) const {
    torch::Tensor grad = p.grad();
    if (decay_ != 0) grad = grad.add(p, decay_);
    if (momentum_ != 0) {
      if (buffer.defined()) {
        buffer.mul_(momentum_).add_(grad);
      } else {
        buffer = grad.clone();
      }
      grad = buffer;
    }
    p.add_(grad, -lr);
  }

  /// b <- momentum b + weight_decay w; d = b (Nesterov: weight_decay w + momentum b); w <- w - lr (d + mean).
  void step_dgc(torch::Tensor& p, torch::Tensor& b, double lr) const {
    if (decay_ == 0) {
      p.add_(p.grad(), -lr);
      return;
    }
    if (!b.defined()) b = torch::zeros_like(p);
    b.mul_(momentum_).add_(p, decay_);
    const torch::Tensor d = nesterov_ ? p.mul(decay_).add_(b, momentum_) : b;
    p.sub_(d.add(p.grad()), lr);
  }

  std::vector<torch::Tensor> parameters_, buffers_;
  bool dgc_, nesterov_ = false;
  double momentum_ = 0, decay_;
};

}  // namespace thinwire::launch
