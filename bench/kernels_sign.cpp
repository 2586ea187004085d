#include "bench/kernels_sign.hpp"

#include <cstring>

#include "bench/kernels_cases.hpp"

namespace thinwire::bench {
namespace {

constexpr float kBeta1 = 0.9f;
/// Residuals of signs settle at about .8 of the gradient's norm (specs: behaviour of error feedback); Arrays::settle takes a density.
constexpr double kSettled = 0.29;
constexpr std::size_t kSlideBetweenRanks = 37;  // repetitions apart: other payloads have other bits

}  // namespace

SignKernel::SignKernel(SignCase what, Arrays& arrays) : case_(std::move(what)), arrays_(arrays) {
  const bool averaged = case_.recursion == "averaged_ef14";
  recursion_ = recursion_named(averaged ? "ef14" : case_.recursion);
  recursion_.averaged = averaged;
  codec_ = make_sign(case_.options, case_.isa);
  segment_.count = arrays.numel();
  segment_.rows = 1;
  segment_.columns = std::uint32_t(segment_.count);
  plan_ = {{&segment_, 1}, {&part_end_, 1}, 0};
  const WireLayout layout = codec_->layout(plan_);
  capacity_ = layout.part_capacity;
  wire_.reserve(capacity_);
  workspace_.reserve(layout.workspace);
  if (recursion_.kind == Recursion::Kind::error_feedback) state_.array = {arrays.residual(), nullptr};
  if (averaged) state_.array = {arrays.momentum(), arrays.residual()};
}

double SignKernel::wire_bytes() const noexcept {
  const double block = double(case_.options.block == 0 ? numel() : case_.options.block);
  return 1.0 / 8 + sizeof(float) / block;
}

double SignKernel::bytes_per_element() const {
  const double state = recursion_.kind == Recursion::Kind::none ? 0 : recursion_.averaged ? 12 : 8;
  return sizeof(float) + state + wire_bytes();
}

void SignKernel::settle() {
  arrays_.settle(recursion_, kSettled);
  // As after many steps of gradients without a mean: (1 − beta1) / (1 + beta1) of their variance.
  if (recursion_.averaged) fill_normal(arrays_.momentum(), numel(), 0.23f, 6);
}

void SignKernel::stream(std::size_t window, std::uint64_t step) {
  plan_.step = step;
  std::uint32_t flags = 0;
  codec_->stream(recursion_, plan_, host_bytes(arrays_.grad(window), numel()), {{&state_, 1}, nullptr, &kBeta1}, workspace_.bytes(),
                 wire_.bytes().sub(0, capacity_), &flags, {}, Stream::host());
}

void SignDecodeKernel::settle() {
  SignCase what;
  what.recursion = "none";
  what.isa = isa_;
  sender_ = std::make_unique<SignKernel>(what, arrays_);
  storage_.clear();
  wires_.clear();
  for (int rank = 0; rank < payloads_; ++rank) {
    sender_->stream(std::size_t(rank) * kSlideBetweenRanks, 0);
    const ConstBytes payload = sender_->payload();
    Buffer& copy = storage_.emplace_back(payload.size);
    std::memcpy(copy.data(), payload.data, payload.size);
    wires_.push_back(copy.bytes().sub(0, payload.size));
  }
  workspace_.reserve(sender_->codec().layout(sender_->plan()).per_payload * std::size_t(payloads_));
}

double SignDecodeKernel::bytes_per_element() const { return sizeof(float) + payloads_ * sender_->wire_bytes(); }

void SignDecodeKernel::run(std::size_t) {
  std::uint32_t flags = 0;
  sender_->codec().decode(sender_->plan(), wires_, 1.0f / float(payloads_), workspace_.bytes(), host_bytes(arrays_.out(), arrays_.numel()),
                          &flags, Stream::host());
}

}  // namespace thinwire::bench
