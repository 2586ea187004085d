#include "bench/kernels_cases.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "compressors/core/config.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/probe.hpp"
#include "compressors/core/registry.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::bench {
namespace {

constexpr std::size_t kSlideBetweenRanks = 37;  // repetitions apart: other payloads' entries lie elsewhere

}  // namespace

Recursion recursion_named(const std::string& name) {
  constexpr std::string_view kAveraged = "averaged_";
  const bool averaged = name.starts_with(kAveraged);
  Recursion out = make_recursion(Config::parse("codec=topk:density=0.01 feedback=" + name.substr(averaged ? kAveraged.size() : 0)));
  out.averaged = averaged;
  return out;
}

SegmentState state_in(const Recursion& recursion, float* momentum, float* residual, std::size_t first) noexcept {
  SegmentState out;
  std::size_t a = 0;
  for (const std::string_view name : state_names(recursion)) {
    float* const array = name == "mean_estimate" ? nullptr : name == "momentum" || name == "estimate" ? momentum : residual;
    if (array != nullptr) {  // the mean of all ranks is the decode's
      const bool narrow = state_dtype(recursion, a) != DType::fp32;
      out.array[a] = (narrow ? StateArray(reinterpret_cast<std::uint16_t*>(array)) : StateArray(array)).from(first);
    }
    ++a;
  }
  return out;
}

double state_bytes(const Recursion& recursion, bool sends_all) noexcept {
  const double residual = recursion.narrow ? 2 : 4, estimate = recursion.grid ? 2 : 4;
  if (recursion.kind == Recursion::Kind::estimate) return (recursion.control ? 2 * residual : 0) + (sends_all ? 2 : 1) * estimate;
  if (recursion.narrow) return 2 * residual + (recursion.averaged ? sizeof(float) : 0);
  return sizeof(float) * (2 * double(state_names(recursion).size()) - (recursion.averaged ? 1 : 0));
}

StreamKernel::StreamKernel(StreamCase what, Arrays& arrays) : case_(std::move(what)), arrays_(arrays) {
  recursion_ = recursion_named(case_.recursion + (case_.keys.empty() ? "" : ":" + case_.keys));
  case_.topk.density = case_.density;
  codec_ = make_topk(case_.topk, case_.isa);
  const std::vector<std::size_t> whole = {arrays.numel()};
  for (const std::size_t count : case_.layers.empty() ? whole : case_.layers) {
    Segment segment;
    segment.parameter = std::uint32_t(segments_.size());
    segment.first = numel_;
    segment.count = count;
    segment.rows = 1;
    segment.columns = std::uint32_t(count);
    segment.setting = {case_.density, eta_of(recursion_, case_.density)};
    segments_.push_back(segment);
    numel_ += count;
  }
  THINWIRE_EXPECTS(numel_ <= arrays.numel(),
                   case_.recursion + ": " + std::to_string(numel_) + " elements in arrays of " + std::to_string(arrays.numel()));
  part_end_ = std::uint32_t(segments_.size());
  plan_ = {segments_, {&part_end_, 1}, 0};
  layout_ = codec_->layout(plan_);
  wire_.reserve(layout_.part_capacity);
  workspace_.reserve(layout_.workspace);
  kept_.resize(segments_.size());

  std::size_t memory = 0, capacity = 0, bytes = 0;
  for (const Segment& segment : segments_) {
    memory += codec_->memory(segment);
    const topk::SegmentWire wire = topk::segment_wire(segment, case_.topk);
    capacity += wire.capacity;
    bytes += wire.bytes();
  }
  memory_.assign(memory, 0.0f);
  entry_bytes_ = double(bytes) / double(capacity);
  float* next = memory_.data();
  for (const Segment& segment : segments_) {
    SegmentState& state = state_.emplace_back(state_in(recursion_, arrays.momentum(), arrays.residual(), segment.first));
    const std::size_t floats = codec_->memory(segment);
    state.memory = floats > 0 ? next : nullptr;
    next += floats;
  }
}

std::optional<double> StreamKernel::density() const {
  return double(std::accumulate(kept_.begin(), kept_.end(), std::uint64_t(0))) / double(numel_);
}

double StreamKernel::bytes_per_element() const {
  return double(size_of(case_.grad)) + state_bytes(recursion_, false) + entry_bytes_ * *density();
}

void StreamKernel::settle() {
  arrays_.settle(recursion_, case_.density);
  std::fill(memory_.begin(), memory_.end(), 0.0f);
}

void StreamKernel::stream(std::size_t window, std::uint64_t step) {
  plan_.step = step;
  const ConstBytes grad =
      case_.grad == DType::bf16 ? host_bytes(arrays_.grad_bf16(window), numel_, DType::bf16) : host_bytes(arrays_.grad(window), numel_);
  std::uint32_t flags = 0;
  codec_->stream(recursion_, plan_, grad, state(), workspace_.bytes(), wire_.bytes().sub(0, layout_.part_capacity), &flags,
                 {kept_.data(), nullptr}, Stream::host());
}

DecodeKernel::DecodeKernel(double density, DType wire, int payloads, Isa isa, Arrays& arrays)
    : density_(density), wire_dtype_(wire), payloads_(payloads), isa_(isa), arrays_(arrays) {}

std::string DecodeKernel::name() const {
  return "decode_topk_" + std::to_string(payloads_) +
         (wire_dtype_ == DType::fp32 ? "" : std::string("_") + to_string(wire_dtype_) + "wire");
}

void DecodeKernel::settle() {
  StreamCase what;
  what.recursion = "none";
  what.density = density_;
  what.topk.wire = wire_dtype_;
  what.isa = isa_;
  sender_ = std::make_unique<StreamKernel>(what, arrays_);
  storage_.clear();
  wires_.clear();
  reached_ = 0;
  for (int rank = 0; rank < payloads_; ++rank) {
    sender_->stream(std::size_t(rank) * kSlideBetweenRanks, 0);
    reached_ += *sender_->density() / payloads_;
    const ConstBytes payload = sender_->payload();
    Buffer& copy = storage_.emplace_back(payload.size);
    std::memcpy(copy.data(), payload.data, payload.size);
    wires_.push_back(copy.bytes().sub(0, payload.size));
  }
  workspace_.reserve(sender_->codec().layout(sender_->plan()).workspace);
  entry_bytes_ = sender_->entry_bytes();
}

double DecodeKernel::bytes_per_element() const { return sizeof(float) + payloads_ * entry_bytes_ * reached_; }

void DecodeKernel::run(std::size_t) {
  std::uint32_t flags = 0;
  sender_->codec().decode(sender_->plan(), wires_, 1.0f / float(payloads_), workspace_.bytes(), host_bytes(arrays_.out(), arrays_.numel()),
                          &flags, Stream::host());
}

DenseKernel::DenseKernel(What what, const std::string& recursion, Arrays& arrays)
    : what_(what), recursion_name_(recursion), recursion_(recursion_named(recursion)), arrays_(arrays) {
  segment_.count = arrays.numel();
  segment_.rows = 1;
  segment_.columns = std::uint32_t(segment_.count);
  plan_ = {{&segment_, 1}, {&part_end_, 1}, 0};
  state_ = state_in(recursion_, arrays.momentum(), arrays.residual());
}

std::string DenseKernel::name_of(What what, const std::string& recursion) {
  return recursion + (what == What::norms ? "_norms" : what == What::look ? "_look" : "_dense");
}

std::string DenseKernel::name() const { return name_of(what_, recursion_name_); }

double DenseKernel::bytes_per_element() const {
  if (what_ == What::norms) return sizeof(float);
  if (what_ == What::look) return 2 * (sizeof(float) + state_bytes(recursion_, true) / 2);  // each pass reads gradient and state
  return sizeof(float) + state_bytes(recursion_, true) + sizeof(float);                     // gradient, state, message
}

void DenseKernel::settle() { arrays_.settle(recursion_, 0.01); }

void DenseKernel::run(std::size_t repetition) {
  const ConstBytes grad = host_bytes(arrays_.grad(repetition), arrays_.numel());
  if (what_ == What::norms) {
    double norm = 0;
    squared_norms(plan_, grad, &norm, Stream::host());
    return;
  }
  const StateView state{{&state_, 1}, nullptr};
  if (what_ == What::look) {
    Probe probe;
    probe_messages(recursion_, plan_, grad, state, {&probe, 1});
    probe_rest(recursion_, plan_, grad, state, {&probe, 1});
    return;
  }
  std::uint32_t flags = 0;
  dense_message(recursion_, plan_, grad, state, host_bytes(arrays_.out(), arrays_.numel()), &flags, Stream::host());
}

}  // namespace thinwire::bench
