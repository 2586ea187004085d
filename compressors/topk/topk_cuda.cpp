// The host's side of top-k on a GPU: plans into tables, calls into launches.

#include "compressors/topk/topk_cuda.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "compressors/core/error.hpp"
#include "compressors/topk/selection.hpp"
#include "compressors/topk/topk_cuda_kernels.hpp"
#include "compressors/topk/topk_math.hpp"
#include "compressors/topk/topk_payload.hpp"

namespace thinwire {
namespace {

using namespace topk;

std::uint32_t chunks_of(std::size_t count, std::size_t size) { return std::uint32_t((count + size - 1) / size); }

/// Calls visit(segment, its device twin) for each segment in turn. @returns the totals.
template <class Visit>
DeviceShape walk(const Plan& plan, const TopKOptions& options, Visit&& visit) {
  DeviceShape shape;
  std::size_t at = entries_offset(plan.segments.size());
  for (const Segment& segment : plan.segments) {
    const SegmentWire wire = segment_wire(segment, options);
    DeviceSegment out;
    out.range.first = segment.first;
    out.range.count = segment.count;
    out.index_at = at;
    out.value_at = at + wire.index_bytes;
    out.live = segment.live;
    out.eta = segment.setting.eta;
    out.k = std::uint32_t(wire.k);
    out.capacity = std::uint32_t(wire.capacity);
    out.form = std::uint32_t(wire.form);
    out.range.first_chunk = std::uint32_t(shape.chunks);
    out.first_sample_block = std::uint32_t(shape.sample_blocks);
    out.first_unit = std::uint32_t(shape.units);
    out.first_candidate = shape.candidates;
    if (segment.count != 0 && (options.exact || wire.k != segment.count)) {
      out.sampled = std::uint32_t(sample_size(segment.count));
      const SampleRanks ranks(segment.count, out.sampled, wire.k);
      out.high = std::uint32_t(ranks.high);
      out.middle = std::uint32_t(options.exact ? candidate_rank(segment.count, out.sampled, wire.k) : ranks.middle);
      out.low = std::uint32_t(ranks.low);
      out.to_high = std::uint32_t(ranks.to_high);
      out.to_low = std::uint32_t(ranks.to_low);
    }
    if (options.exact) out.candidates = std::uint32_t(candidate_capacity(segment.count, wire.k));
    visit(segment, out);
    at += wire.bytes();
    ++shape.segments;
    shape.chunks += chunks_of(segment.count, kDeviceChunk);
    shape.sample_blocks += chunks_of(out.sampled, kSampleBlock);
    shape.units += blocks_of(segment.count);
    shape.candidates += out.candidates;
  }
  shape.payload_bytes = at;
  return shape;
}

DeviceShape shape_of(const Plan& plan, const TopKOptions& options) {
  return walk(plan, options, [](const Segment&, const DeviceSegment&) {});
}

/// Places arrays one after the other from `base` on; without a base only their end is of interest.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* place(std::size_t count) {
    T* const out = base_ != nullptr ? reinterpret_cast<T*>(base_ + end_) : nullptr;
    end_ += round_up(count * sizeof(T), 16);
    return out;
  }
  std::size_t end() const { return end_; }

 private:
  std::byte* base_;
  std::size_t end_ = 0;
};

DeviceScratch carve(const DeviceShape& shape, bool exact, std::byte* base, std::size_t* bytes) {
  Carver at(base);
  DeviceScratch out;
  out.magnitudes = at.place<std::uint32_t>(shape.sample_blocks * kSampleBlock);
  out.near = at.place<std::uint32_t>(shape.sample_blocks * kSampleBlock);
  out.near_count = at.place<std::uint32_t>(shape.sample_blocks);
  out.above = at.place<std::uint32_t>(shape.sample_blocks);
  out.at_least = at.place<std::uint32_t>(shape.sample_blocks);
  out.threshold = at.place<float>(shape.segments);
  out.steepness = at.place<float>(shape.segments);
  out.block_sums = at.place<double>(shape.chunks);
  if (exact) {
    out.candidate_index = at.place<std::uint32_t>(shape.candidates);
    out.candidate_value = at.place<float>(shape.candidates);
  }
  const std::size_t begin = at.end();
  out.cleared = at.place<std::uint32_t>(0);
  out.tickets = at.place<std::uint32_t>(2);
  out.hits = at.place<std::uint32_t>(shape.segments);
  out.looked_back = at.place<std::uint64_t>(shape.chunks);
  if (exact) {
    out.cut_looked_back = at.place<std::uint64_t>(shape.chunks);
    out.histogram = at.place<std::uint32_t>(shape.segments * kDigits * kDigitBins);
  }
  out.cleared_words = (at.end() - begin) / 4;
  *bytes = at.end();
  return out;
}

std::size_t table_size(const DeviceShape& shape) {
  return round_up(shape.segments * sizeof(DeviceSegment) + 4 * (shape.chunks + shape.sample_blocks + shape.units), 16);
}

DeviceTable table_at(const DeviceShape& shape, const std::byte* base) {
  DeviceTable out;
  out.segments = reinterpret_cast<const DeviceSegment*>(base);
  out.chunk_segment = reinterpret_cast<const std::uint32_t*>(out.segments + shape.segments);
  out.sample_segment = out.chunk_segment + shape.chunks;
  out.unit_segment = out.sample_segment + shape.sample_blocks;
  return out;
}

class TopKCuda final : public Codec {
 public:
  TopKCuda(const TopKOptions& options, void (*encoder)(const EncodeCall&, Form, Stream)) : options_(options), encode_(encoder) {}

  Combine combine() const noexcept override { return Combine::gather; }
  std::size_t memory(const Segment&) const noexcept override { return options_.exact ? 0 : 1; }
  const char* memory_name() const noexcept override { return options_.exact ? "" : "threshold"; }
  double nominal_delta(const Segment& segment) const noexcept override {
    return segment.count == 0 ? 1.0 : double(segment_wire(segment, options_).k) / double(segment.count);
  }
  std::size_t target(const Segment& segment) const noexcept override { return segment_wire(segment, options_).k; }

  WireLayout layout(const Plan& plan) const override {
    check_parts(plan);
    const DeviceShape shape = shape_of(plan, options_);
    THINWIRE_EXPECTS(shape.chunks < std::size_t(1) << 31, "topk: a plan of " + std::to_string(shape.chunks * kDeviceChunk) +
                                                              " elements is more than a GPU is given at once, 2^43");
    WireLayout out;
    out.part_capacity = shape.payload_bytes;
    carve(shape, options_.exact, nullptr, &out.workspace);
    out.per_payload = decode_words(shape) * 4;
    return out;
  }

  std::size_t table_bytes(const Plan& plan) const override { return table_size(shape_of(plan, options_)); }

  void tabulate(const Recursion& recursion, const Plan& plan, std::span<const SegmentState> states, std::byte* table) const override {
    const DeviceShape shape = shape_of(plan, options_);
    const DeviceTable at = table_at(shape, table);
    auto* const segments = reinterpret_cast<DeviceSegment*>(table);
    std::size_t s = 0;
    walk(plan, options_, [&](const Segment&, DeviceSegment& out) {
      if (!states.empty()) {
        out.set(recursion, states[s]);
        out.memory = states[s].memory;
      }
      if (!plan.mean_estimates.empty()) out.mean_estimate = plan.mean_estimates[s];
      THINWIRE_EXPECTS(out.aligned(), "topk: state on a GPU starts at a multiple of 16 bytes");
      std::memcpy(&segments[s], &out, sizeof out);
      const auto mark = [&](const std::uint32_t* map, std::uint32_t first, std::size_t count) {
        std::fill_n(const_cast<std::uint32_t*>(map) + first, count, std::uint32_t(s));
      };
      mark(at.chunk_segment, out.range.first_chunk, chunks_of(out.range.count, kDeviceChunk));
      mark(at.sample_segment, out.first_sample_block, chunks_of(out.sampled, kSampleBlock));
      mark(at.unit_segment, out.first_unit, blocks_of(out.range.count));
      ++s;
    });
  }

  void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
              std::uint32_t* flags, const PassCounts& counts, Stream stream) const override {
    kChecks.state(plan, recursion, state.segments.size());
    encode_with(recursion, plan, grad, state, workspace, wire, flags, counts, stream);
  }

  void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream stream) const override {
    kChecks.payload_size(wire.size, shape_of(plan, options_).payload_bytes);
    launch_empty(wire.data, payload_header(plan, options_, wire.size, flags), stream);
  }

  void encode(int round, const Plan& plan, ConstBytes message, ConstBytes, const StateView& state, Bytes workspace, Bytes wire,
              Stream stream) const override {
    kChecks.message(round, message);
    encode_with(Recursion{}, plan, message, {state.segments, nullptr}, workspace, wire, nullptr, {}, stream);
  }

  void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
              Stream stream) const override {
    if (wires.empty()) return;
    kChecks.output(plan, out);
    const std::size_t bytes = shape_of(plan, options_).payload_bytes;
    for (std::size_t r = 0; r < wires.size(); ++r) kChecks.wire_size(r, wires[r].size, bytes);
    DecodeCall call = decode_call(plan, wires.front());
    call.world = std::uint32_t(wires.size());
    call.stride = wires.size() > 1 ? std::size_t(wires[1].data - wires[0].data) : 0;
    for (std::size_t r = 0; r < wires.size(); ++r) {
      THINWIRE_EXPECTS(wires[r].data == wires[0].data + r * call.stride, "topk: on a GPU payloads are decoded equally spaced");
    }
    const std::size_t words = decode_words(call.shape);
    THINWIRE_EXPECTS(workspace.size >= wires.size() * words * 4, "topk: the workspace has " + std::to_string(workspace.size) + " bytes, " +
                                                                     std::to_string(wires.size()) + " payloads need " +
                                                                     std::to_string(wires.size() * words * 4));
    call.chunk_start = workspace.as<std::uint32_t>();
    call.unit_count = call.chunk_start + wires.size() * (call.shape.chunks + call.shape.segments);
    call.factor = plan.factor != nullptr ? DeviceFactor(plan.factor) : DeviceFactor(factor);
    call.estimates = !plan.mean_estimates.empty();
    call.output_factor = plan.output_factor != nullptr ? DeviceFactor(plan.output_factor) : DeviceFactor(plan.output.factor);
    call.out = out.data;
    call.out_dtype = out.dtype;
    call.flags = flags;
    call.report = plan.report;
    launch_decode(call, stream);
  }

  void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView&, const std::uint32_t* verdict,
                 Stream stream) const override {
    if (recursion.kind == Recursion::Kind::estimate) {
      const DeviceShape shape = shape_of(plan, options_);
      return launch_keep_news(recursion, ranges_of(table_of(plan, shape), shape), verdict, stream);
    }
    if (feedback::has_residual(feedback::form_of(recursion))) launch_take_back(decode_call(plan, own_wire), verdict, stream);
  }

  std::string describe(const Plan& plan, const DeviceReport& report) const override {
    const std::string given = std::to_string(report.given), wanted = std::to_string(report.wanted);
    const auto [number, rank, place] = wire::unpack_fault(report.corrupt);
    const auto fault = Fault(number);
    std::string text = "payload of rank " + std::to_string(rank);
    if (fault == Fault::header) return text + ": " + wire::describe_header_fault(place, report.given, report.wanted);
    if (place < plan.segments.size())
      text += ", segment " + std::to_string(place) + " (parameter " + std::to_string(plan.segments[place].parameter) + ")";
    text += ": ";
    switch (fault) {
      case Fault::header:
        break;
      case Fault::kept:
        return text + "kept is " + given + ", at most " + wanted + " are allowed";
      case Fault::order:
        return text + "index " + given + " follows " + wanted + ", indices must ascend";
      case Fault::range:
        return text + "index " + given + " is not below " + wanted;
      case Fault::blocks:
        return text + "blocks count " + given + " entries, kept is " + wanted;
      case Fault::bits:
        return text + "the bitmap has " + given + " bits, kept is " + wanted;
      case Fault::padding:
        return text + "the bitmap has bits past element " + given;
      case Fault::finite:
        return text + "value " + given + " of " + wanted + " is not finite";
    }
    return text + "unsound";
  }

 private:
  static std::size_t decode_words(const DeviceShape& shape) { return shape.chunks + shape.segments + shape.units; }

  DeviceTable table_of(const Plan& plan, const DeviceShape& shape) const {
    THINWIRE_EXPECTS(plan.table.size >= table_size(shape) && plan.table.place == Place::cuda,
                     "topk: on a GPU a plan brings the table that tabulate() wrote, " + std::to_string(table_size(shape)) + " bytes");
    return table_at(shape, plan.table.data);
  }

  static DeviceRanges ranges_of(const DeviceTable& table, const DeviceShape& shape) {
    return {reinterpret_cast<const std::byte*>(table.segments), sizeof(DeviceSegment), shape.segments, shape.chunks, table.chunk_segment};
  }

  DecodeCall decode_call(const Plan& plan, ConstBytes wire) const {
    DecodeCall call;
    call.shape = shape_of(plan, options_);
    kChecks.payload_size(wire.size, call.shape.payload_bytes);
    call.table = table_of(plan, call.shape);
    call.wire = wire.data;
    call.wire_dtype = options_.wire;
    call.header = payload_header(plan, options_, call.shape.payload_bytes, 0);
    return call;
  }

  void encode_with(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
                   std::uint32_t* flags, const PassCounts& counts, Stream stream) const {
    kChecks.input(plan, grad);
    EncodeCall call;
    call.shape = shape_of(plan, options_);
    kChecks.payload_size(wire.size, call.shape.payload_bytes);
    std::size_t bytes = 0;
    call.scratch = carve(call.shape, options_.exact, workspace.data, &bytes);
    kChecks.workspace(workspace.size, bytes);
    call.table = table_of(plan, call.shape);
    call.grad = grad.data;
    call.grad_factor = state.grad_factor;
    call.wire = wire.data;
    call.flags = flags;
    call.kept = counts.kept;
    call.header = payload_header(plan, options_, wire.size, 0);
    call.draw = draw_of(options_.seed, plan.step);
    call.rate = feedback::rate_of(recursion);
    call.keep = average_shares(recursion).keep;
    call.fresh = average_shares(recursion).fresh;
    call.grid = recursion.grid;
    call.narrow = recursion.narrow;
    call.floor = wire_floor(options_.wire);
    call.grad_dtype = grad.dtype;
    call.wire_dtype = options_.wire;
    call.mask = recursion.mask;
    call.exact = options_.exact;
    if (counts.norms != nullptr)
      launch_squared_norms(ranges_of(call.table, call.shape), grad, call.scratch.block_sums, counts.norms, stream);
    encode_(call, feedback::form_of(recursion), stream);
  }

  TopKOptions options_;
  void (*encode_)(const EncodeCall&, Form, Stream);
};

}  // namespace

std::unique_ptr<const Codec> topk::make_topk_cuda_with(const TopKOptions& options, void (*encode)(const EncodeCall&, Form, Stream)) {
  THINWIRE_EXPECTS(options.wire != DType::u8, "topk: wire values are fp32, bf16 or fp16");
  return std::make_unique<TopKCuda>(options, encode);
}

std::unique_ptr<const Codec> make_topk_cuda(const TopKOptions& options) { return make_topk_cuda_with(options, launch_encode); }

}  // namespace thinwire
