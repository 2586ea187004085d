#include "launch/trainer/buckets.hpp"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "compressors/core/error.hpp"

namespace thinwire::launch {

Buckets::Buckets(GradientReducer& reducer, std::vector<torch::Tensor> parameters, std::size_t bucket_bytes)
    : reducer_(reducer), parameters_(std::move(parameters)) {
  const torch::Device device = parameters_.front().device();
  if (device.is_cuda()) side_ = std::make_unique<torch_ext::SideStream>(device.index());
  std::size_t filled = bucket_bytes;  // opens the first bucket
  for (std::size_t i = parameters_.size(); i-- > 0;) {
    THINWIRE_EXPECTS(parameters_[i].is_contiguous() && parameters_[i].scalar_type() == torch::kFloat32 && parameters_[i].device() == device,
                     "parameter " + std::to_string(i) + " is not contiguous fp32 on " + device.str());
    if (filled >= bucket_bytes || filled + parameters_[i].nbytes() > 2 * bucket_bytes) {
      buckets_.emplace_back();
      filled = 0;
    }
    buckets_.back().parameters.push_back(std::uint32_t(i));
    filled += parameters_[i].nbytes();
  }
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    Bucket& bucket = buckets_[b];
    std::int64_t count = 0, first = 0;
    for (const std::uint32_t id : bucket.parameters) count += parameters_[id].numel();
    bucket.grad = torch::zeros({count}, parameters_.front().options().requires_grad(false));
    for (const std::uint32_t id : bucket.parameters) {
      torch::Tensor& parameter = parameters_[id];
      parameter.mutable_grad() = bucket.grad.narrow(0, first, parameter.numel()).view(parameter.sizes());
      first += parameter.numel();
      // The node that adds a gradient to its place; a hook behind it runs when the gradient is there.
      const std::shared_ptr<torch::autograd::Node> node = torch::autograd::impl::grad_accumulator(parameter);
      const std::uintptr_t key = node->add_post_hook(std::make_unique<torch::autograd::utils::LambdaPostHook>(
          [this, b](const torch::autograd::variable_list& outputs, const torch::autograd::variable_list&) {
            arrived(b);
            return outputs;
          }));
      hooks_.push_back({node, key});
    }
    bucket.missing = bucket.parameters.size();
  }
}

Buckets::~Buckets() {
  for (const Hook& hook : hooks_) hook.node->del_post_hook(hook.key);
}

void Buckets::zero() {
  const torch::NoGradGuard no_grad;
  for (Bucket& bucket : buckets_) {
    bucket.grad.zero_();
    bucket.missing = bucket.parameters.size();
  }
  next_ = 0;
}

void Buckets::start(Bucket& bucket) {
  Bytes grad = host_bytes(bucket.grad.data_ptr<float>(), std::size_t(bucket.grad.numel()));
  if (side_ == nullptr) {
    bucket.work = reducer_.reduce(bucket.parameters, grad);
    return;
  }
  grad.place = Place::cuda;
  grad.device = bucket.grad.device().index();
  side_->run(bucket.grad, [&](Stream stream) { bucket.work = reducer_.reduce(bucket.parameters, grad, stream); });
}

void Buckets::arrived(std::size_t bucket) {
  --buckets_[bucket].missing;
  for (; next_ < buckets_.size() && buckets_[next_].missing == 0; ++next_) start(buckets_[next_]);
}

void Buckets::finish() {
  for (; next_ < buckets_.size(); ++next_) start(buckets_[next_]);  // of parameters that the loss did not depend on
  for (Bucket& bucket : buckets_) bucket.work.wait();
  if (side_ != nullptr) side_->join();
}

}  // namespace thinwire::launch
