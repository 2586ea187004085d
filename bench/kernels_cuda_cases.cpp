#include "bench/kernels_cuda_cases.hpp"

#include <algorithm>
#include <cstdio>
#include <memory>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_data.hpp"
#include "bench/kernels_sign.hpp"
#include "bench/unordered.hpp"
#include "compressors/sign/sign_cuda.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire::bench {
namespace {

std::string with_density(std::string name, double density) {
  char text[32];
  std::snprintf(text, sizeof text, "/%g", density);
  return name + text;
}

/// What Codec::stream is measured with.
struct Pass {
  std::string name;
  std::shared_ptr<const Codec> codec;
  Recursion recursion;
  double settled = 0;                    ///< what DeviceArrays::settle takes
  double entry_bytes = 0;                ///< of the payload, per element that is sent
  std::optional<double> density = {};    ///< top-k's
  std::vector<std::size_t> layers = {};  ///< elements per segment
  DType grad = DType::fp32;
};

Pass topk_pass(DeviceArrays& arrays, StreamCase what, const auto& make) {
  what.topk.density = what.density;
  if (what.layers.empty()) what.layers = {arrays.numel()};
  return {.name = with_density(what.name(), what.density),
          .codec = make(what.topk),
          .recursion = recursion_named(what.recursion),
          .settled = what.density,
          // fp32 values, and at these densities 16-bit offsets where the index is chosen automatically.
          .entry_bytes = what.topk.index == TopKOptions::Index::u32 ? 8.0 : 6.0,
          .density = what.density,
          .layers = what.layers,
          .grad = what.grad};
}
Pass topk_pass(DeviceArrays& arrays, const StreamCase& what) { return topk_pass(arrays, what, make_topk_cuda); }

Pass sign_pass(DeviceArrays& arrays, const SignCase& what) {
  return {.name = what.name(),
          .codec = make_sign_cuda(what.options),
          .recursion = recursion_named(what.recursion),
          .settled = SignCase::kSettled,
          .entry_bytes = what.wire_bytes(arrays.numel()),
          .layers = {arrays.numel()}};
}

/// A pass in device memory, and what it leaves.
class Streamed {
 public:
  Streamed(DeviceArrays& arrays, const Pass& pass) : arrays_(arrays), pass_(pass) {
    std::size_t memory = 0;
    for (const std::size_t count : pass_.layers) {
      Segment segment;
      segment.parameter = std::uint32_t(segments_.size());
      segment.first = numel_;
      segment.count = count;
      segment.setting.density = pass_.density.value_or(1);
      segment.setting.eta = eta_of(pass_.recursion, pass_.codec->nominal_delta(segment));
      segments_.push_back(segment);
      numel_ += count;
      memory += pass_.codec->memory(segment);
    }
    part_end_ = std::uint32_t(segments_.size());
    memory_.reserve(4 * memory, kDevice);
    kept_.reserve(4 * segments_.size(), kDevice);
    beta1_.reserve(4 * segments_.size(), kDevice);
    flags_.reserve(4, kDevice);
    device_clear(memory_.bytes(), arrays.stream());
    device_clear(flags_.bytes(), arrays.stream());
    const std::vector<float> beta1(segments_.size(), kBeta1);
    device_copy(beta1_.data(), beta1.data(), 4 * beta1.size(), arrays.stream());
    std::size_t at = 0;
    float* next = reinterpret_cast<float*>(memory_.data());
    for (const Segment& segment : segments_) {
      SegmentState& state = states_.emplace_back(state_in(pass_.recursion, arrays.momentum(), arrays.residual(), at));
      const std::size_t floats = pass_.codec->memory(segment);
      state.memory = floats > 0 ? next : nullptr;
      next += floats;
      at += round_up(segment.count, 16);  // as a reducer places it; Arrays::kSlack has room for what that adds
    }
    plan_ = {segments_, {&part_end_, 1}, 0};
    layout_ = pass_.codec->layout(plan_);
    workspace_.reserve(std::max(layout_.workspace, kPayloads * layout_.per_payload), kDevice);
    wire_.reserve(kPayloads * round_up(layout_.part_capacity, 64), kDevice);
    std::vector<std::byte> table(pass_.codec->table_bytes(plan_));
    pass_.codec->tabulate(pass_.recursion, plan_, states_, table.data());
    table_.reserve(table.size(), kDevice);
    device_copy(table_.data(), table.data(), table.size(), arrays.stream());
    device_wait(arrays.stream());
    plan_.table = {table_.data(), table.size(), DType::u8, Place::cuda, kDevice};
  }
  void settle() { arrays_.settle(pass_.recursion, pass_.settled); }
  void run(std::size_t repetition, std::size_t slot = 0) {
    const StateView state{states_, nullptr, reinterpret_cast<const float*>(beta1_.data())};
    pass_.codec->stream(pass_.recursion, plan_, arrays_.grad(repetition, pass_.grad, numel_), state, workspace_.bytes(), wire(slot),
                        reinterpret_cast<std::uint32_t*>(flags_.data()), {reinterpret_cast<std::uint32_t*>(kept_.data()), nullptr},
                        arrays_.stream());
  }
  void decode(int payloads) {
    std::vector<ConstBytes> wires;
    for (int r = 0; r < payloads; ++r) wires.push_back(wire(std::size_t(r)));
    pass_.codec->decode(plan_, wires, 1.0f / float(payloads), workspace_.bytes(),
                        {arrays_.out(), 4 * numel_, DType::fp32, Place::cuda, kDevice}, reinterpret_cast<std::uint32_t*>(flags_.data()),
                        arrays_.stream());
  }
  /// The share of the elements that the last pass sent.
  double sent() const {
    std::vector<std::uint32_t> kept(segments_.size());
    device_copy(kept.data(), kept_.data(), 4 * kept.size(), arrays_.stream());
    device_wait(arrays_.stream());
    std::size_t sum = 0;
    for (const std::uint32_t k : kept) sum += k;
    return double(sum) / double(numel_);
  }
  double payload_bytes() const { return sent() * pass_.entry_bytes; }
  /// The minimum: gradient and state once each way, and the payload.
  double bytes_per_element() const { return double(size_of(pass_.grad)) + state_bytes(pass_.recursion, !pass_.density) + payload_bytes(); }

  static constexpr std::size_t kPayloads = 8;

 private:
  Bytes wire(std::size_t slot) const {
    return {wire_.data() + slot * round_up(layout_.part_capacity, 64), layout_.part_capacity, DType::u8, Place::cuda, kDevice};
  }

  DeviceArrays& arrays_;
  Pass pass_;
  std::vector<Segment> segments_;
  std::uint32_t part_end_ = 0;
  std::vector<SegmentState> states_;
  std::size_t numel_ = 0;
  Plan plan_;
  WireLayout layout_;
  DeviceBuffer memory_, kept_, beta1_, flags_, workspace_, wire_, table_;
};

Case stream_case(DeviceArrays& arrays, const Pass& pass) {
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  out.name = pass.name;
  for (const std::size_t n : pass.layers) out.numel += n;
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, pass);
    (*streamed)->settle();
  };
  out.run = [=](std::size_t repetition) { (*streamed)->run(repetition); };
  out.bytes_per_element = [=] { return (*streamed)->bytes_per_element(); };
  if (pass.density) out.density = [=] { return (*streamed)->sent(); };
  return out;
}

/// Payloads of this pass into one mean.
Case decode_case(DeviceArrays& arrays, const Pass& pass, const std::string& name) {
  auto streamed = std::make_shared<std::unique_ptr<Streamed>>();
  Case out;
  out.name = name;
  out.numel = arrays.numel();
  out.settle = [=, &arrays] {
    *streamed = std::make_unique<Streamed>(arrays, pass);
    (*streamed)->settle();
    for (std::size_t r = 0; r < Streamed::kPayloads; ++r) (*streamed)->run(r, r);
  };
  out.run = [=](std::size_t) { (*streamed)->decode(int(Streamed::kPayloads)); };
  out.bytes_per_element = [=] { return 4 + double(Streamed::kPayloads) * (*streamed)->payload_bytes(); };
  if (pass.density) out.density = [=] { return (*streamed)->sent(); };
  return out;
}

}  // namespace

std::vector<DeviceGroup> all_device_groups(DeviceArrays& arrays) {
  std::vector<DeviceGroup> out;
  const auto topk = [&](const StreamCase& what) { return stream_case(arrays, topk_pass(arrays, what)); };
  const auto alone = [&](const Case& one) { out.push_back({{one}, ""}); };
  for (const char* recursion : {"dgc", "ef14", "econtrol", "none"})
    for (const double density : {0.001, 0.01, 0.08}) alone(topk({.recursion = recursion, .density = density}));
  const std::vector<std::size_t> less = {std::min(arrays.numel(), kExactNumel)};
  for (const char* recursion : {"dgc", "ef14", "none"}) alone(topk({.recursion = recursion, .topk = {.exact = true}, .layers = less}));
  for (const char* recursion : {"dgc", "ef14"}) alone(topk({.recursion = recursion, .variant = "bf16grad", .grad = DType::bf16}));
  StreamCase u32{.recursion = "ef14", .variant = "unordered", .topk = {.index = TopKOptions::Index::u32}};
  const Case without = stream_case(arrays, topk_pass(arrays, u32, make_topk_unordered));
  u32.variant = "u32";
  out.push_back({{without, topk(u32)}, "ordered against unordered selection"});
  std::size_t resnet50 = 0;
  for (const std::size_t count : resnet50_layers()) resnet50 += count;
  if (arrays.numel() >= resnet50) {
    const Case flat = topk({.variant = "resnet50_flat", .layers = {resnet50}});
    out.push_back({{flat, topk({.variant = "resnet50", .layers = resnet50_layers()})}, "161 ResNet-50 layers against one array"});
  }
  for (const double density : {0.001, 0.01, 0.08})
    alone(decode_case(arrays, topk_pass(arrays, {.recursion = "ef14", .density = density}), with_density("decode_topk_8", density)));
  for (const char* recursion : {"ef14", "averaged_ef14", "none"}) alone(stream_case(arrays, sign_pass(arrays, {.recursion = recursion})));
  alone(stream_case(arrays, sign_pass(arrays, {.variant = "512", .options = {.block = 512}})));
  alone(stream_case(arrays, sign_pass(arrays, {.recursion = "econtrol", .variant = "512", .options = {.block = 512}})));
  alone(stream_case(arrays, sign_pass(arrays, {.variant = "tensor", .options = {.block = 0}})));
  alone(decode_case(arrays, sign_pass(arrays, {.recursion = "none"}), "decode_sign_8"));
  return out;
}

}  // namespace thinwire::bench
