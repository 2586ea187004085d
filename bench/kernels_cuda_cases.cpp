#include "bench/kernels_cuda_cases.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "bench/kernels_data.hpp"
#include "bench/unordered.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire::bench {
namespace {

using MakeCodec = std::unique_ptr<const Codec> (*)(const TopKOptions&);

std::unique_ptr<const Codec> unordered(const TopKOptions& options) { return make_topk_unordered(options); }

/// Codec::stream of a plan, and what it leaves.
class Streamed {
 public:
  Streamed(DeviceArrays& arrays, const StreamCase& what, MakeCodec make)
      : arrays_(arrays), recursion_(recursion_named(what.recursion)), density_(what.density), grad_(what.grad) {
    codec_ = make(what.topk);
    std::vector<std::size_t> layers = what.layers;
    if (layers.empty()) layers = {arrays.numel()};
    for (const std::size_t count : layers) {
      Segment segment;
      segment.parameter = std::uint32_t(segments_.size());
      segment.first = numel_;
      segment.count = count;
      segment.setting.density = what.density;
      segments_.push_back(segment);
      numel_ += count;
    }
    part_end_ = std::uint32_t(segments_.size());
    // fp32 values, and at these densities 16-bit offsets where the index is chosen automatically.
    entry_bytes_ = what.topk.index == TopKOptions::Index::u32 ? 8 : 6;
    memory_.reserve(4 * segments_.size(), kDevice);
    kept_.reserve(4 * segments_.size(), kDevice);
    flags_.reserve(4, kDevice);
    device_clear(memory_.bytes(), arrays.stream());
    device_clear(flags_.bytes(), arrays.stream());
    std::size_t at = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      SegmentState& state = states_.emplace_back();
      if (recursion_.kind == Recursion::Kind::error_feedback) state.array = {arrays.residual() + at, nullptr};
      if (recursion_.kind == Recursion::Kind::momentum_correction) state.array = {arrays.momentum() + at, arrays.residual() + at};
      if (!what.topk.exact) state.memory = reinterpret_cast<float*>(memory_.data()) + s;
      at += round_up(segments_[s].count, 16);  // as a reducer places it; Arrays::kSlack has room for what that adds
    }
    plan_ = {segments_, {&part_end_, 1}, 0};
    layout_ = codec_->layout(plan_);
    workspace_.reserve(std::max(layout_.workspace, kPayloads * layout_.per_payload), kDevice);
    wire_.reserve(kPayloads * round_up(layout_.part_capacity, 64), kDevice);
    std::vector<std::byte> table(codec_->table_bytes(plan_));
    codec_->tabulate(recursion_, plan_, states_, table.data());
    table_.reserve(table.size(), kDevice);
    device_copy(table_.data(), table.data(), table.size(), arrays.stream());
    device_wait(arrays.stream());
    plan_.table = {table_.data(), table.size(), DType::u8, Place::cuda, kDevice};
  }
  void settle() { arrays_.settle(recursion_, density_); }
  void run(std::size_t repetition, std::size_t slot = 0) {
    codec_->stream(recursion_, plan_, arrays_.grad(repetition, grad_, numel_), {states_, nullptr}, workspace_.bytes(), wire(slot),
                   reinterpret_cast<std::uint32_t*>(flags_.data()), {reinterpret_cast<std::uint32_t*>(kept_.data()), nullptr},
                   arrays_.stream());
  }
  void decode(int payloads) {
    std::vector<ConstBytes> wires;
    for (int r = 0; r < payloads; ++r) wires.push_back(wire(std::size_t(r)));
    codec_->decode(plan_, wires, 1.0f / float(payloads), workspace_.bytes(), {arrays_.out(), 4 * numel_, DType::fp32, Place::cuda, kDevice},
                   reinterpret_cast<std::uint32_t*>(flags_.data()), arrays_.stream());
  }
  std::optional<double> density() const {
    std::vector<std::uint32_t> kept(segments_.size());
    device_copy(kept.data(), kept_.data(), 4 * kept.size(), arrays_.stream());
    device_wait(arrays_.stream());
    std::size_t sum = 0;
    for (const std::uint32_t k : kept) sum += k;
    return double(sum) / double(numel_);
  }
  /// The minimum: gradient and state once each way, and the entries.
  double bytes_per_element() const {
    const double state = recursion_.kind == Recursion::Kind::none ? 0 : recursion_.kind == Recursion::Kind::error_feedback ? 8 : 16;
    return double(size_of(grad_)) + state + *density() * entry_bytes();
  }
  double entry_bytes() const { return entry_bytes_; }
  std::size_t numel() const { return numel_; }

  static constexpr std::size_t kPayloads = 8;

 private:
  Bytes wire(std::size_t slot) const {
    return {wire_.data() + slot * round_up(layout_.part_capacity, 64), layout_.part_capacity, DType::u8, Place::cuda, kDevice};
  }

  DeviceArrays& arrays_;
  Recursion recursion_;
  double density_, entry_bytes_ = 0;
  DType grad_;
  std::unique_ptr<const Codec> codec_;
  std::vector<Segment> segments_;
  std::uint32_t part_end_ = 0;
  std::vector<SegmentState> states_;
  std::size_t numel_ = 0;
  Plan plan_;
  WireLayout layout_;
  DeviceBuffer memory_, kept_, flags_, workspace_, wire_, table_;
};

std::string with_density(std::string name, double density) {
  char text[32];
  std::snprintf(text, sizeof text, "/%g", density);
  return name + text;
}

Case stream_case(DeviceArrays& arrays, StreamCase what, MakeCodec make = make_topk_cuda) {
  what.topk.density = what.density;
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  out.name = with_density(
      what.recursion + "_topk_" + (what.topk.exact ? "exact" : "sampled") + (what.grad == DType::fp32 ? "" : "_bf16grad") + what.variant,
      what.density);
  out.numel = what.layers.empty() ? arrays.numel() : 0;
  for (const std::size_t n : what.layers) out.numel += n;
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, what, make);
    (*streamed)->settle();
  };
  out.run = [=](std::size_t repetition) { (*streamed)->run(repetition); };
  out.bytes_per_element = [=] { return (*streamed)->bytes_per_element(); };
  out.density = [=] { return (*streamed)->density(); };
  return out;
}

Case decode_case(DeviceArrays& arrays, double density) {
  StreamCase what{.recursion = "ef14", .density = density};
  what.topk.density = density;
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  out.name = with_density("decode_topk_8", density);
  out.numel = arrays.numel();
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, what, make_topk_cuda);
    (*streamed)->settle();
    for (std::size_t r = 0; r < Streamed::kPayloads; ++r) (*streamed)->run(r, r);
  };
  out.run = [=](std::size_t) { (*streamed)->decode(int(Streamed::kPayloads)); };
  out.density = [=] { return (*streamed)->density(); };
  out.bytes_per_element = [=] { return 4 + double(Streamed::kPayloads) * *(*streamed)->density() * (*streamed)->entry_bytes(); };
  return out;
}

}  // namespace

DeviceArrays::DeviceArrays(std::size_t numel, Stream stream) : numel_(numel), stream_(stream) {
  const std::size_t bytes = 4 * (numel + Arrays::kSlack);
  for (DeviceBuffer* buffer : {&grad_, &momentum_, &residual_, &from_, &out_}) buffer->reserve(bytes, kDevice);
  half_.reserve(bytes / 2, kDevice);
  std::vector<float> host(numel + Arrays::kSlack);
  fill_normal(host.data(), host.size(), 1.0f, 1);
  device_copy(grad_.data(), host.data(), bytes, stream);
  device_copy(from_.data(), host.data(), bytes, stream);
  device_wait(stream);
  std::vector<std::uint16_t> half(host.size());
  std::transform(host.begin(), host.end(), half.begin(), [](float x) { return float_to_bf16(x); });
  device_copy(half_.data(), half.data(), bytes / 2, stream);
  device_wait(stream);
}

ConstBytes DeviceArrays::grad(std::size_t repetition, DType dtype, std::size_t numel) const {
  const std::size_t at = repetition * Arrays::kSlide % Arrays::kSlack;
  const std::byte* base = dtype == DType::fp32 ? grad_.data() : half_.data();
  return {base + at * size_of(dtype), numel * size_of(dtype), dtype, Place::cuda, kDevice};
}

void DeviceArrays::settle(const Recursion& recursion, double density) {
  const bool momentum = recursion.kind == Recursion::Kind::momentum_correction;
  const float sigma = momentum ? 1.0f / std::sqrt(1.0f - recursion.momentum * recursion.momentum) : 1.0f;
  std::vector<float> host(numel_);
  fill_normal(host.data(), numel_, sigma, 2);
  device_copy(momentum_.data(), host.data(), 4 * numel_, stream_);
  device_wait(stream_);
  fill_uniform(host.data(), numel_, float(0.8 * sigma / (2 * density)), 3);
  device_copy(residual_.data(), host.data(), 4 * numel_, stream_);
  device_wait(stream_);
}

std::vector<DeviceGroup> all_device_groups(DeviceArrays& arrays) {
  std::vector<DeviceGroup> out;
  const auto alone = [&](const StreamCase& what) { out.push_back({{stream_case(arrays, what)}, ""}); };
  for (const char* recursion : {"dgc", "ef14", "none"})
    for (const double density : {0.001, 0.01, 0.08}) alone({.recursion = recursion, .density = density});
  StreamCase exact;
  exact.topk.exact = true;
  for (const char* recursion : {"dgc", "ef14", "none"}) {
    exact.recursion = recursion;
    alone(exact);
  }
  for (const char* recursion : {"dgc", "ef14"}) alone({.recursion = recursion, .grad = DType::bf16});
  StreamCase u32{.recursion = "ef14", .variant = "_unordered"};
  u32.topk.index = TopKOptions::Index::u32;
  const Case without = stream_case(arrays, u32, unordered);
  u32.variant = "_u32";
  out.push_back({{without, stream_case(arrays, u32)}, "ordered against unordered selection"});
  std::size_t resnet50 = 0;
  for (const std::size_t count : resnet50_layers()) resnet50 += count;
  if (arrays.numel() >= resnet50) {
    const Case flat = stream_case(arrays, {.variant = "_resnet50_flat", .layers = {resnet50}});
    out.push_back(
        {{flat, stream_case(arrays, {.variant = "_resnet50", .layers = resnet50_layers()})}, "161 ResNet-50 layers against one array"});
  }
  for (const double density : {0.001, 0.01, 0.08}) out.push_back({{decode_case(arrays, density)}, ""});
  return out;
}

}  // namespace thinwire::bench
