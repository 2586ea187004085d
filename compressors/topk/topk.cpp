#include "compressors/topk/topk.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/topk/topk_codec.hpp"
#include "compressors/topk/topk_payload.hpp"

namespace thinwire {
namespace topk {

const Kernels& kernels(Isa isa) {
  THINWIRE_EXPECTS(cpu_supports(isa), std::string("topk: this CPU does not support ") + to_string(isa));
  return isa == Isa::avx512 ? kernels_avx512() : isa == Isa::avx2 ? kernels_avx2() : kernels_scalar();
}

std::size_t carve(const Plan& plan, const TopKOptions& options, std::byte* base, Workspace* out) {
  std::size_t staging = 0, magnitudes = 0, candidates = 0;
  for (const Segment& segment : plan.segments) {
    staging = std::max(staging, std::min<std::size_t>(segment.count, kBlock) + kStagingSlack);
    magnitudes = std::max(magnitudes, sample_size(segment.count));
    if (options.exact) candidates = std::max(candidates, candidate_capacity(segment.count, segment_wire(segment, options).k));
  }
  const std::size_t scratch = magnitudes + kSampleGroup;
  magnitudes = std::max(magnitudes, candidates) + kSampleGroup;
  std::size_t end = 0;
  const auto place = [&](auto*& pointer, std::size_t count) {
    if (base != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + end);
    end += round_up(count * sizeof(*pointer), 64);
  };
  Workspace workspace;
  place(workspace.index, staging);
  place(workspace.value, staging);
  place(workspace.bitmap, kBlock / 32);
  place(workspace.magnitudes, magnitudes);
  place(workspace.scratch, scratch);
  place(workspace.candidate_index, candidates);
  place(workspace.candidate_value, candidates);
  const std::size_t encoding = end;
  end = 0;
  place(workspace.tile, kTile + kStagingSlack);
  place(workspace.cursors, 2 * kMaxPayloads);
  if (out != nullptr) *out = workspace;
  return std::max(encoding, end);
}

Block block_at(const SegmentPass& pass, std::size_t first, const Workspace& workspace) noexcept {
  Block block = pass.segment;
  block.grad = static_cast<const std::byte*>(block.grad) + first * size_of(pass.grad_dtype);
  if (block.momentum != nullptr) block.momentum += first;
  for (float** array : {&block.residual, &block.estimate, &block.average})
    if (*array != nullptr) *array += first;
  if (block.live != nullptr) block.live += first / 8;
  block.count = std::uint32_t(std::min<std::size_t>(pass.segment.count - first, kBlock));
  block.index = workspace.index;
  block.value = workspace.value;
  return block;
}

}  // namespace topk

namespace {

using namespace topk;

class TopK final : public Codec {
 public:
  TopK(const TopKOptions& options, Isa isa) : options_(options), kernels_(kernels(isa)) {}

  Combine combine() const noexcept override { return Combine::gather; }
  std::size_t memory(const Segment&) const noexcept override { return options_.exact ? 0 : 1; }
  const char* memory_name() const noexcept override { return options_.exact ? "" : "threshold"; }
  double nominal_delta(const Segment& segment) const noexcept override {
    return segment.count == 0 ? 1.0 : double(segment_wire(segment, options_).k) / double(segment.count);
  }
  std::size_t target(const Segment& segment) const noexcept override { return segment_wire(segment, options_).k; }

  WireLayout layout(const Plan& plan) const override {
    check_parts(plan);
    std::size_t bytes = entries_offset(plan.segments.size());
    for (const Segment& segment : plan.segments) bytes += segment_wire(segment, options_).bytes();
    return {bytes, carve(plan, options_, nullptr, nullptr) + kAlignment, 0};
  }

  void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
              std::uint32_t* flags, const PassCounts& counts, Stream) const override {
    run(recursion, plan, grad, state, workspace, wire, flags, counts);
  }

  void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream) const override {
    const std::size_t bytes = layout(plan).part_capacity;
    kChecks.payload_size(wire.size, bytes);
    std::memset(wire.data, 0, bytes);
    write_header(plan, wire, flags);
  }

  void encode(int round, const Plan& plan, ConstBytes message, ConstBytes, const StateView& state, Bytes workspace, Bytes wire,
              Stream) const override {
    kChecks.message(round, message);
    run(Recursion{}, plan, message, {state.segments, nullptr}, workspace, wire, nullptr, {});
  }

  void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
              Stream) const override;
  void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state, const std::uint32_t* verdict,
                 Stream) const override;

 private:
  static constexpr std::size_t kAlignment = 64;

  Workspace carve_aligned(const Plan& plan, Bytes workspace) const {
    const std::size_t bytes = carve(plan, options_, nullptr, nullptr) + kAlignment;
    kChecks.workspace(workspace.size, bytes);
    Workspace out;
    carve(plan, options_, workspace.data + (kAlignment - reinterpret_cast<std::uintptr_t>(workspace.data) % kAlignment) % kAlignment, &out);
    return out;
  }
  std::uint64_t fingerprint(const Plan& plan) const noexcept { return wire::plan_fingerprint(plan, options_salt(options_)); }
  void write_header(const Plan& plan, Bytes wire, std::uint32_t flags) const {
    wire::write_header(payload_header(plan, options_, wire.size, flags), wire);
  }
  /// Checks a payload from end to end; the flags of its header.
  std::uint32_t check(const Plan& plan, ConstBytes wire, std::size_t rank) const;
  void run(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
           std::uint32_t* flags, const PassCounts& counts) const;

  TopKOptions options_;
  const Kernels& kernels_;
};

void TopK::run(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
               std::uint32_t* flags, const PassCounts& counts) const {
  kChecks.payload_size(wire.size, layout(plan).part_capacity);
  kChecks.input(plan, grad);
  const Workspace scratch = carve_aligned(plan, workspace);
  const Form form = feedback::form_of(recursion);
  kChecks.state(plan, recursion, state.segments.size());
  THINWIRE_EXPECTS(!recursion.grid || options_.wire == DType::fp32, "topk: estimates on bf16's grid need fp32 values on the wire");

  std::uint32_t found = flags != nullptr ? *flags : 0;
  std::byte* at = wire.data + entries_offset(plan.segments.size());
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const SegmentState own = state.segments.empty() ? SegmentState{} : state.segments[s];
    const SegmentWire layout = segment_wire(segment, options_);
    feedback::SquaredNorm norm;
    SegmentPass pass{kernels_,
                     form,
                     grad.dtype,
                     {},
                     residual_of(recursion, own),
                     estimate_of(recursion, own),
                     draw_of(options_.seed, plan.step),
                     segment.setting.density,
                     wire_floor(options_.wire)};
    pass.norm = counts.norms != nullptr ? &norm : nullptr;
    pass.segment.grad = grad.data + segment.first * size_of(grad.dtype);
    pass.segment.momentum = feedback::has_momentum(form) ? own.array[0].fp32() : nullptr;
    pass.segment.residual = pass.residual.fp32();
    pass.segment.estimate = pass.estimate.fp32();
    pass.segment.average = average_of(recursion, own);
    pass.segment.live = segment.live;
    pass.segment.count = std::uint32_t(segment.count);
    pass.segment.factor = state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f;
    pass.segment.rate =
        feedback::has_estimate(form) ? feedback::limited_eta(segment.setting.eta, own.eta_limit) : feedback::rate_of(recursion);
    pass.segment.keep = average_shares(recursion).keep;
    pass.segment.fresh = average_shares(recursion).fresh;
    pass.segment.wire = options_.wire;
    pass.segment.mask = recursion.mask;
    pass.segment.narrow = recursion.narrow;
    pass.segment.grid = recursion.grid;

    SegmentPacker packer(layout, options_.wire, segment.count, at, kernels_.narrow);
    if (segment.count != 0) {
      found |= options_.exact ? stream_exact(pass, layout, scratch, packer).flags
                              : stream_sampled(pass, layout, own.memory, scratch, packer).flags;
    }
    packer.finish();
    const std::uint32_t sent = packer.kept();
    std::memcpy(wire.data + sizeof(wire::Header) + 4 * s, &sent, 4);
    if (counts.kept != nullptr) counts.kept[s] = sent;
    if (counts.norms != nullptr) counts.norms[s] = norm.sum();
    at += layout.bytes();
  }
  write_header(plan, wire, found);
  if (flags != nullptr) *flags = found;
}

std::uint32_t TopK::check(const Plan& plan, ConstBytes wire, std::size_t rank) const {
  // The text is made where something is wrong only: a sound payload allocates nothing.
  const auto whose = [rank] { return "payload of rank " + std::to_string(rank); };
  wire::Header header;
  try {
    header = wire::read_header(wire, wire::kCodecTopK, fingerprint(plan), std::uint32_t(plan.segments.size()), plan.step);
  } catch (const Error& error) { fail(error.code(), whose() + ": " + error.what()); }
  std::size_t at = entries_offset(plan.segments.size());
  std::size_t bytes = at;
  for (const Segment& segment : plan.segments) bytes += segment_wire(segment, options_).bytes();
  kChecks.wire_size(rank, wire.size, bytes);
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const SegmentWire layout = segment_wire(plan.segments[s], options_);
    std::uint32_t kept;
    std::memcpy(&kept, wire.data + sizeof(wire::Header) + 4 * s, 4);
    try {
      check_entries(layout, options_.wire, plan.segments[s].count, kept, wire.data + at);
    } catch (const Error& error) {
      fail(error.code(),
           whose() + ", segment " + std::to_string(s) + " (parameter " + std::to_string(plan.segments[s].parameter) + "): " + error.what());
    }
    at += layout.bytes();
  }
  return header.flags;
}

void TopK::decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
                  Stream) const {
  THINWIRE_EXPECTS(wires.size() <= kMaxPayloads,
                   "topk: " + std::to_string(wires.size()) + " payloads, at most " + std::to_string(kMaxPayloads) + " are decoded at once");
  kChecks.output(plan, out);
  const Workspace scratch = carve_aligned(plan, workspace);
  std::uint32_t found = 0;
  for (std::size_t r = 0; r < wires.size(); ++r) found |= check(plan, wires[r], r);

  std::memset(scratch.tile, 0, 4 * kTile);
  std::size_t at = entries_offset(plan.segments.size());
  auto* cursors = reinterpret_cast<Cursor*>(scratch.cursors);
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const SegmentWire layout = segment_wire(segment, options_);
    std::fill_n(cursors, wires.size(), Cursor{});
    const bool streaming = segment.count * size_of(out.dtype) >= kStreamingBytes;
    for (std::size_t begin = 0; begin < segment.count; begin += kTile) {
      const std::size_t end = std::min(begin + kTile, segment.count);
      for (std::size_t r = 0; r < wires.size(); ++r) {
        Entries entries{wires[r].data + at, wires[r].data + at + layout.index_bytes, 0};
        std::memcpy(&entries.kept, wires[r].data + sizeof(wire::Header) + 4 * s, 4);
        add_range(kernels_, layout, options_.wire, segment.count, entries, cursors[r], begin, end, scratch.tile);
      }
      float scale = factor;
      if (!plan.mean_estimates.empty()) {
        add_to_mean_estimate(scratch.tile, factor, plan.mean_estimates[s] + begin, end - begin);
        scale = plan.output.factor;
      }
      if (!kernels_.finish(scratch.tile, end - begin, scale, out.dtype, out.data + (segment.first + begin) * size_of(out.dtype), streaming))
        found |= kFlagNonfinite;
    }
    at += layout.bytes();
  }
  if (flags != nullptr) *flags |= found;
}

void TopK::take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state,
                     const std::uint32_t* verdict, Stream) const {
  if (verdict != nullptr && (*verdict & kFlagNonfinite) == 0) return;
  check(plan, own_wire, 0);
  if (recursion.kind == Recursion::Kind::estimate) return keep_news(recursion, plan, state);
  if (!feedback::has_residual(feedback::form_of(recursion))) return;
  std::size_t at = entries_offset(plan.segments.size());
  for (std::size_t s = 0; s < plan.segments.size(); ++s) {
    const Segment& segment = plan.segments[s];
    const SegmentWire layout = segment_wire(segment, options_);
    Entries entries{own_wire.data + at, own_wire.data + at + layout.index_bytes, 0};
    std::memcpy(&entries.kept, own_wire.data + sizeof(wire::Header) + 4 * s, 4);
    const StateArray residual = residual_of(recursion, state.segments[s]);
    const std::size_t step = residual.narrow() ? kStatePiece : kBlock;
    Cursor cursor;
    for (std::size_t begin = 0; begin < segment.count; begin += step) {
      const std::size_t end = std::min(begin + step, segment.count);
      StatePiece piece(residual.from(begin), residual.narrow() ? end - begin : 0);
      add_range(kernels_, layout, options_.wire, segment.count, entries, cursor, begin, end, piece.data());
    }
    at += layout.bytes();
  }
}

}  // namespace

std::unique_ptr<const Codec> make_topk(const TopKOptions& options, Isa isa) {
  THINWIRE_EXPECTS(options.wire != DType::u8, "topk: wire values are fp32, bf16 or fp16");
  return std::make_unique<TopK>(options, isa);
}

}  // namespace thinwire
