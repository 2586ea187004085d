// The host's side of the sign codec on a GPU: plans into tables, calls into launches.

#include "compressors/sign/sign_cuda.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "compressors/core/codec_checks.hpp"
#include "compressors/core/error.hpp"
#include "compressors/sign/sign_cuda_kernels.hpp"
#include "compressors/sign/sign_wire.hpp"

namespace thinwire {
namespace {

using namespace sign;

constexpr CodecChecks kChecks{"sign"};

constexpr std::size_t pieces_of(std::size_t count, std::size_t size) noexcept { return (count + size - 1) / size; }

/// Calls visit_segment(segment, its device twin) for each segment in turn, and visit_part(its device twin) for each part. @returns the
/// totals.
template <class VisitSegment, class VisitPart>
DeviceShape walk(const Plan& plan, const SignOptions& options, VisitSegment&& visit_segment, VisitPart&& visit_part) {
  DeviceShape shape;
  shape.parts = parts_of(plan);
  shape.capacity = part_capacity(plan, options);
  for (std::size_t r = 0; r < shape.parts; ++r) {
    const std::span<const Segment> part = part_of(plan, r);
    const PartWire layout = part_wire(part, options);
    std::size_t scales_at = r * shape.capacity + sizeof(wire::Header), bits_at = r * shape.capacity + layout.bits_offset();
    for (const Segment& segment : part) {
      DeviceSegment out;
      out.range.first = segment.first;
      out.range.count = segment.count;
      out.range.first_chunk = std::uint32_t(shape.chunks);
      out.scales_at = scales_at;
      out.bits_at = bits_at;
      out.live = segment.live;
      out.eta = segment.setting.eta;
      out.part = std::uint32_t(r);
      out.block = std::clamp<std::size_t>(segment.count, 1, block_of(options, segment.count));
      out.first_tile = std::uint32_t(shape.tiles);
      out.first_wide = std::uint32_t(shape.wides);
      std::size_t tiles = 0;
      if (out.wide()) {
        const std::size_t whole = segment.count / out.block;
        out.tile = std::uint32_t(kSumBlock);
        out.pieces = std::uint32_t(pieces_of(out.block, kSumBlock));
        tiles = whole * out.pieces + pieces_of(segment.count - whole * out.block, kSumBlock);
        shape.wides += pieces_of(segment.count, out.block);
      } else {
        out.tile = std::uint32_t(kSumBlock / out.block * out.block);
        tiles = pieces_of(segment.count, out.tile);
      }
      visit_segment(segment, out, tiles);
      scales_at += 4 * scales_of(options, segment.count);
      bits_at += bit_bytes(segment.count);
      shape.segments += 1;
      shape.chunks += device_chunks(segment.count);
      shape.tiles += tiles;
      shape.scales += scales_of(options, segment.count);
    }
    DevicePart out;
    out.bytes = layout.bits_offset() + layout.bits;
    out.scales = layout.scales;
    out.segments = std::uint32_t(part.size());
    visit_part(part, out);
  }
  return shape;
}

DeviceShape shape_of(const Plan& plan, const SignOptions& options) {
  return walk(
      plan, options, [](const Segment&, const DeviceSegment&, std::size_t) {}, [](std::span<const Segment>, const DevicePart&) {});
}

std::size_t table_size(const DeviceShape& shape) {
  return round_up(
      shape.segments * sizeof(DeviceSegment) + shape.parts * sizeof(DevicePart) + 4 * (shape.chunks + shape.tiles + shape.wides), 16);
}

DeviceTable table_at(const DeviceShape& shape, const std::byte* base) {
  DeviceTable out;
  out.segments = reinterpret_cast<const DeviceSegment*>(base);
  out.parts = reinterpret_cast<const DevicePart*>(out.segments + shape.segments);
  out.chunk_segment = reinterpret_cast<const std::uint32_t*>(out.parts + shape.parts);
  out.tile_segment = out.chunk_segment + shape.chunks;
  out.wide_segment = out.tile_segment + shape.tiles;
  return out;
}

/// Where the scratch lies from `base` on. @returns its bytes.
std::size_t place_scratch(const DeviceShape& shape, std::byte* base, DeviceScratch* out) {
  const std::size_t tiles = shape.wides != 0 ? shape.tiles : 0;
  if (base != nullptr) {
    out->block_sums = reinterpret_cast<double*>(base);
    out->tile_sums = out->block_sums + shape.chunks;
    out->tile_live = reinterpret_cast<std::uint32_t*>(out->tile_sums + tiles);
  }
  return 8 * shape.chunks + 12 * tiles;
}

class SignCuda final : public Codec {
 public:
  explicit SignCuda(const SignOptions& options) : options_(options) {}

  Combine combine() const noexcept override { return Combine::reencode; }
  std::size_t memory(const Segment&) const noexcept override { return 0; }
  const char* memory_name() const noexcept override { return ""; }
  double nominal_delta(const Segment&) const noexcept override { return kSignDelta; }
  std::size_t target(const Segment& segment) const noexcept override { return segment.count; }

  WireLayout layout(const Plan& plan) const override {
    const DeviceShape shape = shape_of(plan, options_);
    THINWIRE_EXPECTS(
        std::max(shape.chunks, shape.tiles) < std::size_t(1) << 31,
        "sign: a plan of " + std::to_string(shape.chunks * kDeviceChunk) + " elements is more than a GPU is given at once, 2^43");
    return {shape.capacity, place_scratch(shape, nullptr, nullptr), 0};
  }

  std::size_t table_bytes(const Plan& plan) const override { return table_size(shape_of(plan, options_)); }

  void tabulate(const Recursion& recursion, const Plan& plan, std::span<const SegmentState> states, std::byte* table) const override {
    const DeviceShape shape = shape_of(plan, options_);
    const DeviceTable at = table_at(shape, table);
    std::memset(table, 0, table_size(shape));
    std::size_t s = 0, r = 0;
    const auto put = [](auto* where, const auto& what) {
      std::memcpy(const_cast<void*>(static_cast<const void*>(where)), &what, sizeof what);
    };
    const auto visit_segment = [&](const Segment&, DeviceSegment& out, std::size_t tiles) {
      if (!states.empty() && out.range.count != 0) out.set(recursion, states[s]);  // an empty part has its place anywhere
      if (!plan.mean_estimates.empty() && out.range.count != 0) out.mean_estimate = plan.mean_estimates[s];
      THINWIRE_EXPECTS(out.aligned(), "sign: state on a GPU starts at a multiple of 16 bytes");
      put(at.segments + s, out);
      const auto mark = [&](const std::uint32_t* map, std::uint32_t first, std::size_t count) {
        std::fill_n(const_cast<std::uint32_t*>(map) + first, count, std::uint32_t(s));
      };
      mark(at.chunk_segment, out.range.first_chunk, device_chunks(out.range.count));
      mark(at.tile_segment, out.first_tile, tiles);
      if (out.wide()) mark(at.wide_segment, out.first_wide, pieces_of(out.range.count, out.block));
      ++s;
    };
    const auto visit_part = [&](std::span<const Segment> part, DevicePart& out) {
      out.fingerprint = payload_header(plan, part, options_, 0, 0).plan;
      put(at.parts + r++, out);
    };
    walk(plan, options_, visit_segment, visit_part);
  }

  void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
              std::uint32_t* flags, const PassCounts& counts, Stream stream) const override {
    kChecks.state(plan, recursion, state.segments.size());
    encode_with(recursion, plan, grad, state, workspace, wire, flags, counts, stream);
  }

  void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream stream) const override {
    EncodeCall call = encode_call(plan, wire);
    call.header.flags = flags;
    launch_empty(call, stream);
  }

  void encode(int round, const Plan& plan, ConstBytes message, ConstBytes, const StateView&, Bytes workspace, Bytes wire,
              Stream stream) const override {
    kChecks.message(round, message);
    encode_with(Recursion{}, plan, message, {}, workspace, wire, nullptr, {}, stream);
  }

  void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes, Bytes out, std::uint32_t* flags,
              Stream stream) const override {
    if (wires.empty()) return;
    kChecks.output(plan, out);
    DecodeCall call = decode_call(plan);
    call.apart = call.shape.parts > 1;
    THINWIRE_EXPECTS(!call.apart || wires.size() == call.shape.parts,
                     "sign: " + std::to_string(wires.size()) + " payloads for a plan of " + std::to_string(call.shape.parts) + " parts");
    // A payload may be longer than its plan's part, where another part of the sender's is; all ranks' are then.
    for (std::size_t r = 0; r < wires.size(); ++r) kChecks.wire_size(r, wires[r].size, std::max(wires[0].size, call.shape.capacity));
    call.wire = wires.front().data;
    call.world = call.apart ? 1 : std::uint32_t(wires.size());
    call.stride = wires.size() > 1 ? std::size_t(wires[1].data - wires[0].data) : 0;
    for (std::size_t r = 0; r < wires.size(); ++r)
      THINWIRE_EXPECTS(wires[r].data == wires[0].data + r * call.stride, "sign: on a GPU payloads are decoded equally spaced");
    call.header = payload_header(plan, plan.segments, options_, wires.front().size, 0);
    call.factor = plan.factor != nullptr ? DeviceFactor(plan.factor) : DeviceFactor(factor);
    call.estimates = !plan.mean_estimates.empty();
    call.output_factor = plan.output_factor != nullptr ? DeviceFactor(plan.output_factor) : DeviceFactor(plan.output.factor);
    call.out = out.data;
    call.dtype = out.dtype;
    call.flags = flags;
    call.report = plan.report;
    launch_decode(call, stream);
  }

  void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state, const std::uint32_t* verdict,
                 Stream stream) const override {
    if (!feedback::has_residual(feedback::form_of(recursion))) return;
    DecodeCall call = decode_call(plan);
    if (recursion.kind == Recursion::Kind::estimate) return launch_keep_news(recursion, ranges_of(call.table, call.shape), verdict, stream);
    kChecks.payload_size(own_wire.size, call.shape.capacity * call.shape.parts);
    check_recursion(recursion, plan, state);
    call.wire = own_wire.data;
    launch_take_back(call, recursion.averaged ? state.beta1 : nullptr, verdict, stream);
  }

  std::string describe(const Plan&, const DeviceReport& report) const override {
    const auto [fault, rank, place] = wire::unpack_fault(report.corrupt);
    const std::string text = "payload of rank " + std::to_string(rank) + ": ";
    if (Fault(fault) == Fault::header) return text + wire::describe_header_fault(place, report.given, report.wanted);
    return text + describe_scale_fault(place, report.wanted, bits_float(std::uint32_t(report.given)));
  }

 private:
  DeviceTable table_of(const Plan& plan, const DeviceShape& shape) const {
    THINWIRE_EXPECTS(plan.table.size >= table_size(shape) && plan.table.place == Place::cuda,
                     "sign: on a GPU a plan brings the table that tabulate() wrote, " + std::to_string(table_size(shape)) + " bytes");
    return table_at(shape, plan.table.data);
  }

  static DeviceRanges ranges_of(const DeviceTable& table, const DeviceShape& shape) {
    return {reinterpret_cast<const std::byte*>(table.segments), sizeof(DeviceSegment), shape.segments, shape.chunks, table.chunk_segment};
  }

  DecodeCall decode_call(const Plan& plan) const {
    DecodeCall call;
    call.shape = shape_of(plan, options_);
    call.table = table_of(plan, call.shape);
    return call;
  }

  EncodeCall encode_call(const Plan& plan, Bytes wire) const {
    EncodeCall call;
    call.shape = shape_of(plan, options_);
    kChecks.payload_size(wire.size, call.shape.capacity * call.shape.parts);
    call.table = table_of(plan, call.shape);
    call.wire = wire.data;
    call.header.codec = wire::kCodecSign;
    call.header.bytes = call.shape.capacity;
    call.header.step = plan.step;
    return call;
  }

  void encode_with(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
                   std::uint32_t* flags, const PassCounts& counts, Stream stream) const {
    kChecks.input(plan, grad);
    const Form form = feedback::form_of(recursion);
    check_recursion(recursion, plan, state);
    EncodeCall call = encode_call(plan, wire);
    kChecks.workspace(workspace.size, place_scratch(call.shape, workspace.data, &call.scratch));
    call.grad = grad.data;
    call.grad_factor = state.grad_factor;
    call.beta1 = state.beta1;
    call.flags = flags;
    call.kept = counts.kept;
    call.output = plan.output;
    call.output_factor = plan.output_factor;
    call.rate = feedback::rate_of(recursion);
    call.keep = average_shares(recursion).keep;
    call.fresh = average_shares(recursion).fresh;
    call.narrow = recursion.narrow;
    call.dtype = grad.dtype;
    call.scale = options_.scale;
    if (counts.norms != nullptr)
      launch_squared_norms(ranges_of(call.table, call.shape), grad, call.scratch.block_sums, counts.norms, stream);
    launch_encode(call, form, stream);
  }

  SignOptions options_;
};

}  // namespace

std::unique_ptr<const Codec> make_sign_cuda(const SignOptions& options) {
  check_options(options);
  return std::make_unique<SignCuda>(options);
}

}  // namespace thinwire
