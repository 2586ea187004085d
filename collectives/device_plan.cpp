#include "collectives/device_plan.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace thinwire {
namespace {

constexpr std::size_t kAlign = 256;

/// What kernels leave for the host.
struct Mapped {
  DeviceReport report;
  std::uint64_t wrong_scale = 0;
};

/// Tables one after the other on the host, until their place on the device is known.
class Writer {
 public:
  std::size_t append(const void* data, std::size_t bytes) {
    const std::size_t at = round_up(bytes_.size(), kAlign);
    bytes_.resize(at + bytes);
    if (bytes != 0) std::memcpy(bytes_.data() + at, data, bytes);
    return at;
  }
  /// Numbers the chunks of `dense` and appends both tables.
  void append(std::vector<DeviceDense> dense, DeviceRanges* out) {
    std::vector<std::uint32_t> chunk_segment;
    for (std::size_t s = 0; s < dense.size(); ++s) {
      dense[s].range.first_chunk = std::uint32_t(chunk_segment.size());
      chunk_segment.insert(chunk_segment.end(), device_chunks(dense[s].range.count), std::uint32_t(s));
    }
    const std::size_t base = append(dense.data(), dense.size() * sizeof(DeviceDense));
    const std::size_t map = append(chunk_segment.data(), chunk_segment.size() * 4);
    *out = {nullptr, sizeof(DeviceDense), dense.size(), chunk_segment.size(), nullptr};
    places_.push_back({out, base, map});
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }
  void resolve(const std::byte* device) const {
    for (const Place& place : places_) {
      place.ranges->base = device + place.base;
      place.ranges->chunk_segment = reinterpret_cast<const std::uint32_t*>(device + place.map);
    }
  }

 private:
  struct Place {
    DeviceRanges* ranges;
    std::size_t base, map;
  };
  std::vector<std::byte> bytes_;
  std::vector<Place> places_;
};

DeviceDense dense_of(const Segment& segment, const SegmentState& state, const Recursion& recursion, std::size_t factor,
                     std::size_t packed) {
  DeviceDense out;
  out.range.first = segment.first;
  out.range.count = segment.count;
  out.factor = std::uint32_t(factor);
  out.packed = packed;
  if (recursion.kind == Recursion::Kind::momentum_correction) out.momentum = state.array[0];
  out.residual = residual_of(recursion, state);
  return out;
}

/// The segments of a group, packed from element `packed` on.
void append_group(const Passengers& group, const Recursion& recursion, std::size_t packed, std::vector<DeviceDense>* out) {
  for (std::size_t s = 0; s < group.segments.size(); ++s) {
    out->push_back(dense_of(group.segments[s], group.states[s], recursion, s, packed));
    packed += group.segments[s].count;
  }
}

}  // namespace

DevicePlan::DevicePlan(std::shared_ptr<const BucketPlan> of, const Codec* codec, const Recursion& recursion, int world, int rank,
                       int device, Stream stream)
    : bucket(std::move(of)), mapped_(sizeof(Mapped)) {
  const BucketPlan& plan = *bucket;
  auto* const mapped = new (mapped_.data()) Mapped;
  report = &mapped->report;
  wrong_scale = &mapped->wrong_scale;
  Writer tables;
  std::vector<std::byte> codec_table;
  if (codec != nullptr && !plan.whole_dense) {
    codec_table.resize(codec->table_bytes(plan.plan(0)));
    codec->tabulate(recursion, plan.plan(0), plan.states, codec_table.data());
  }
  tables.append(codec_table.data(), codec_table.size());  // first: at the start of its buffer, whose alignment is the table's
  for (int g = 0; g < 2; ++g) {
    std::vector<DeviceDense> dense;
    append_group(plan.passengers[g], recursion, 0, &dense);
    tables.append(std::move(dense), &whole[g]);
  }
  {
    std::vector<DeviceDense> dense;
    for (std::size_t s = 0; s < plan.segments.size(); ++s) dense.push_back(dense_of(plan.segments[s], plan.states[s], recursion, s, 0));
    tables.append(std::move(dense), &whole[2]);
  }
  if (plan.owners) {
    const std::size_t size = size_of(plan.dtype);
    std::vector<DeviceDense> parts;
    for (std::size_t g = 0; g < 2; ++g) {
      std::vector<DeviceDense> dense;
      std::size_t at = 0;  // bytes
      for (std::size_t r = 0; r < plan.shares.size(); at += plan.send_bytes[r++]) {
        const auto& share = plan.shares[r].parts;
        append_group(share[g], recursion, (at + (g == 0 ? 0 : share[0].bytes())) / size_of(share[g].dtype), &dense);
      }
      tables.append(std::move(dense), &sent[g]);
      DeviceDense own;
      own.range.count = plan.shares[std::size_t(rank)].parts[g].count;
      tables.append(std::vector<DeviceDense>{own}, &owned[g]);
    }
    for (std::size_t r = 0; r < std::size_t(world); ++r) {
      std::size_t at = (r * plan.contribution + plan.layout.part_capacity) / size;
      for (const Passengers& group : plan.shares[r].parts) {
        append_group(group, recursion, at, &parts);
        at += group.count;
      }
    }
    tables.append(std::move(parts), &finished);
  }
  tables_.reserve(std::max<std::size_t>(tables.bytes().size(), 1), device);
  device_copy(tables_.data(), tables.bytes().data(), tables.bytes().size(), stream);
  tables.resolve(tables_.data());
  codec_table_ = {tables_.data(), codec_table.size(), DType::u8, Place::cuda, device};

  std::size_t end = 0, chunks = 0;
  const auto place = [&](std::size_t bytes) {
    const std::size_t at = end;
    end += round_up(bytes, kAlign);
    return at;
  };
  const std::size_t flags_at = place(4), scales_at = place(sizeof(DeviceScales)), kept_at = place(4 * plan.segments.size());
  std::size_t norms_at[3], factors_at[3];
  for (int g = 0; g < 3; ++g) {
    norms_at[g] = place(8 * whole[g].segments);
    factors_at[g] = place(4 * whole[g].segments);
    chunks = std::max(chunks, whole[g].chunks);
  }
  const std::size_t sums_at = place(8 * chunks);
  arrays_.reserve(end, device);
  device_clear(arrays_.bytes(), stream);
  const auto pointer = [&]<class T>(std::size_t at, T*& out) { out = reinterpret_cast<T*>(arrays_.data() + at); };
  pointer(flags_at, flags);
  pointer(scales_at, scales);
  pointer(kept_at, kept);
  pointer(sums_at, block_sums);
  for (int g = 0; g < 3; ++g) {
    pointer(norms_at[g], norms[g]);
    pointer(factors_at[g], factors[g]);
  }
  device_wait(stream);  // the host's tables end here
}

Plan DevicePlan::plan(std::uint64_t step) const noexcept {
  Plan out = bucket->plan(step);
  out.table = codec_table_;
  out.report = report;
  out.factor = &scales->mean;
  return out;
}

}  // namespace thinwire
