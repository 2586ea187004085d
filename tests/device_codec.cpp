#include "tests/device_codec.hpp"

#include <algorithm>
#include <vector>

#include "compressors/core/device.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

constexpr int kDevice = 0;

/// What one call has on the device: host arrays with a twin each.
class Twins {
 public:
  Twins() : stream_(kDevice) {}
  Stream stream() const { return stream_.get(); }

  /// A device array that holds what the host's does, and gives it back if `returns`.
  template <class T>
  T* of(T* host, std::size_t count, bool returns) {
    if (host == nullptr) return nullptr;
    // A null pointer is no array: also an empty one has an address.
    DeviceBuffer& buffer = buffers_.emplace_back(count * sizeof(T) + 1, kDevice);
    device_copy(buffer.data(), host, count * sizeof(T), stream());
    if (returns) back_.push_back({const_cast<std::remove_const_t<T>*>(host), buffer.data(), count * sizeof(T)});
    return reinterpret_cast<T*>(buffer.data());
  }
  template <class Byte>
  BasicBytes<Byte> of(BasicBytes<Byte> host, bool returns) {
    return {of(host.data, host.size, returns), host.size, host.dtype, Place::cuda, kDevice};
  }
  /// Waits for the device and copies back.
  void finish() {
    for (const Back& back : back_) device_copy(back.host, back.device, back.bytes, stream());
    device_wait(stream());
  }

 private:
  struct Back {
    void* host;
    const void* device;
    std::size_t bytes;
  };
  DeviceStream stream_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<Back> back_;
};

class DeviceCodec final : public Codec {
 public:
  explicit DeviceCodec(std::unique_ptr<const Codec> codec) : codec_(std::move(codec)) {}

  Combine combine() const noexcept override { return codec_->combine(); }
  std::size_t memory(const Segment& segment) const noexcept override { return codec_->memory(segment); }
  const char* memory_name() const noexcept override { return codec_->memory_name(); }
  double nominal_delta(const Segment& segment) const noexcept override { return codec_->nominal_delta(segment); }
  std::size_t target(const Segment& segment) const noexcept override { return codec_->target(segment); }
  WireLayout layout(const Plan& plan) const override { return codec_->layout(plan); }

  void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes workspace, Bytes wire,
              std::uint32_t* flags, const PassCounts& counts, Stream) const override {
    Twins twins;
    const Moved moved(*codec_, twins, recursion, plan, state);
    const std::size_t segments = plan.segments.size();
    codec_->stream(recursion, moved.plan, twins.of(grad, false), moved.state, twins.of(workspace, false), twins.of(wire, true),
                   twins.of(flags, 1, true), {twins.of(counts.kept, segments, true), twins.of(counts.norms, segments, true)},
                   twins.stream());
    twins.finish();
  }

  void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream) const override {
    Twins twins;
    const Moved moved(*codec_, twins, {}, plan, {});
    codec_->empty(moved.plan, twins.of(wire, true), flags, twins.stream());
    twins.finish();
  }

  void encode(int round, const Plan& plan, ConstBytes message, ConstBytes previous, const StateView& state, Bytes workspace, Bytes wire,
              Stream) const override {
    Twins twins;
    const Moved moved(*codec_, twins, {}, plan, state);
    codec_->encode(round, moved.plan, twins.of(message, false), previous, moved.state, twins.of(workspace, false), twins.of(wire, true),
                   twins.stream());
    twins.finish();
  }

  void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes, Bytes out, std::uint32_t* flags,
              Stream) const override {
    Twins twins, result;
    Moved moved(*codec_, twins, {}, plan, {});
    MappedBuffer report(sizeof(DeviceReport));
    moved.plan.report = new (report.data()) DeviceReport;
    // Payloads lie where a gather leaves them, one after the other at any multiple of 4.
    std::size_t slot = 0;
    for (const ConstBytes& wire : wires) slot = std::max(slot, round_up(wire.size, 4) + 4);
    std::vector<std::byte> gathered(slot * wires.size());
    for (std::size_t r = 0; r < wires.size(); ++r) std::copy_n(wires[r].data, wires[r].size, gathered.data() + r * slot);
    const std::byte* const base = twins.of(gathered.data(), gathered.size(), false);
    std::vector<ConstBytes> moved_wires;
    for (std::size_t r = 0; r < wires.size(); ++r) moved_wires.push_back({base + r * slot, wires[r].size, DType::u8, Place::cuda, kDevice});
    const WireLayout layout = codec_->layout(plan);
    std::vector<std::byte> workspace(std::max(layout.workspace, layout.per_payload * wires.size()), std::byte{0xa5});
    codec_->decode(moved.plan, moved_wires, factor, twins.of(Bytes{workspace.data(), workspace.size()}, false), result.of(out, true),
                   result.of(flags, 1, true), twins.stream());
    twins.finish();
    if (moved.plan.report->corrupt != 0) fail(Errc::corrupt_payload, codec_->describe(plan, *moved.plan.report));
    result.finish();
  }

  void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state, const std::uint32_t* verdict,
                 Stream) const override {
    Twins twins;
    const Moved moved(*codec_, twins, recursion, plan, state);
    codec_->take_back(recursion, moved.plan, twins.of(own_wire, false), moved.state, twins.of(verdict, 1, false), twins.stream());
    twins.finish();
  }

 private:
  /// A plan and its state on the device.
  struct Moved {
    std::vector<Segment> segments;
    std::vector<SegmentState> states;
    std::vector<float*> mean_estimates;
    std::vector<std::byte> table;
    Plan plan;
    StateView state;

    Moved(const Codec& codec, Twins& twins, const Recursion& recursion, const Plan& host, const StateView& given)
        : segments(host.segments.begin(), host.segments.end()), states(given.segments.begin(), given.segments.end()), plan(host) {
      for (std::size_t s = 0; s < segments.size(); ++s) {
        segments[s].live = twins.of(segments[s].live, segments[s].count / 8 + 1, false);
        if (!host.mean_estimates.empty()) mean_estimates.push_back(twins.of(host.mean_estimates[s], segments[s].count, true));
        if (states.empty()) continue;
        for (StateArray& array : states[s].array)
          array = array.narrow() ? StateArray(twins.of(array.bf16(), segments[s].count, true))
                                 : StateArray(twins.of(array.fp32(), segments[s].count, true));
        states[s].memory = twins.of(states[s].memory, codec.memory(segments[s]), true);
      }
      plan.segments = segments;
      plan.mean_estimates = mean_estimates;
      table.resize(codec.table_bytes(plan));
      codec.tabulate(recursion, plan, states, table.data());
      plan.table = {twins.of(table.data(), table.size(), false), table.size(), DType::u8, Place::cuda, kDevice};
      state = {states, twins.of(given.grad_factor, segments.size(), false), twins.of(given.beta1, segments.size(), false)};
    }
  };

  std::unique_ptr<const Codec> codec_;
};

}  // namespace

std::unique_ptr<const Codec> on_device(std::unique_ptr<const Codec> codec) { return std::make_unique<DeviceCodec>(std::move(codec)); }

}  // namespace thinwire
