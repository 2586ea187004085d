#include "bench/kernels_sign.hpp"

#include <cstring>

#include "bench/kernels_cases.hpp"

namespace thinwire::bench {
namespace {

constexpr std::size_t kSlideBetweenRanks = 37;  // repetitions apart: other payloads have other bits

}  // namespace

double SignCase::wire_bytes(std::size_t numel) const noexcept {
  return 1.0 / 8 + sizeof(float) / double(options.block == 0 ? numel : options.block);
}

SignKernel::SignKernel(SignCase what, Arrays& arrays) : case_(std::move(what)), arrays_(arrays) {
  recursion_ = recursion_named(case_.recursion);
  codec_ = make_sign(case_.options, case_.isa);
  segment_.count = arrays.numel();
  segment_.rows = 1;
  segment_.columns = std::uint32_t(segment_.count);
  segment_.setting.eta = eta_of(recursion_, codec_->nominal_delta(segment_));
  plan_ = {{&segment_, 1}, {&part_end_, 1}, 0};
  const WireLayout layout = codec_->layout(plan_);
  capacity_ = layout.part_capacity;
  wire_.reserve(capacity_);
  workspace_.reserve(layout.workspace);
  state_ = state_in(recursion_, arrays.momentum(), arrays.residual());
}

double SignKernel::bytes_per_element() const { return sizeof(float) + state_bytes(recursion_, true) + case_.wire_bytes(numel()); }

void SignKernel::stream(std::size_t window, std::uint64_t step) {
  plan_.step = step;
  std::uint32_t flags = 0;
  codec_->stream(recursion_, plan_, host_bytes(arrays_.grad(window), numel()), {{&state_, 1}, nullptr, &kBeta1}, workspace_.bytes(),
                 wire_.bytes().sub(0, capacity_), &flags, {}, Stream::host());
}

void SignDecodeKernel::settle() {
  sender_ = std::make_unique<SignKernel>(sent_, arrays_);
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

double SignDecodeKernel::bytes_per_element() const { return sizeof(float) + payloads_ * sent_.wire_bytes(numel()); }

void SignDecodeKernel::run(std::size_t) {
  std::uint32_t flags = 0;
  sender_->codec().decode(sender_->plan(), wires_, 1.0f / float(payloads_), workspace_.bytes(), host_bytes(arrays_.out(), arrays_.numel()),
                          &flags, Stream::host());
}

}  // namespace thinwire::bench
