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
  out.set(recursion, state);
  return out;
}

/// The segments of a group, packed from element `packed` on.
void append_group(const Passengers& group, const Recursion& recursion, std::size_t packed, std::vector<DeviceDense>* out) {
  for (std::size_t s = 0; s < group.segments.size(); ++s) {
    out->push_back(dense_of(group.segments[s], group.states[s], recursion, s, packed));
    packed += group.segments[s].count;
  }
}

/// What a group's owner holds back, as its messages lie from element `packed` on.
void append_server(const Passengers& group, std::size_t packed, std::vector<DeviceDense>* out) {
  for (std::size_t s = 0; s < group.segments.size(); packed += group.segments[s++].count) {
    const Passengers::Owned& owned = group.owned[s];
    if (owned.residual == nullptr) continue;
    DeviceDense dense;
    dense.range.count = owned.count;
    dense.packed = packed + owned.first;
    dense.residual = owned.residual;
    out->push_back(dense);
  }
}

}  // namespace

void DevicePlan::upload_masks(int device, Stream stream) {
  segments_ = bucket->segments;
  own_ = bucket->phases.own;
  momentum_segments_ = bucket->segments;
  std::size_t bytes = 1;
  for (const SharedMomentum& shared : bucket->momenta) bytes += shared.live != nullptr ? round_up(shared.count, 128) / 8 : 0;
  masks_.reserve(bytes, device);
  std::size_t at = 0, packed = 0;
  for (const SharedMomentum& shared : bucket->momenta) {
    if (shared.live != nullptr) {
      device_copy(masks_.data() + at, shared.live, (shared.count + 7) / 8, stream);
      const auto* const there = reinterpret_cast<const std::uint8_t*>(masks_.data() + at);
      for (std::vector<Segment>* list : {&segments_, &own_, &momentum_segments_})
        for (Segment& segment : *list)
          if (segment.parameter == shared.parameter) segment.live = there + (segment.live - shared.live);
      at += round_up(shared.count, 128) / 8;
    }
    for (std::size_t s = 0; s < momentum_segments_.size(); ++s)
      if (momentum_segments_[s].parameter == shared.parameter)
        momentum_segments_[s].first = packed + (bucket->segments[s].first - shared.first);
    packed += shared.count;
  }
  momentum_count = packed;
}

DevicePlan::DevicePlan(std::shared_ptr<const BucketPlan> of, const Codec* codec, const Watch* watch, int world, int rank, int device,
                       Stream stream)
    : bucket(std::move(of)), mapped_(sizeof(Mapped)) {
  const BucketPlan& plan = *bucket;
  const Recursion& recursion = plan.recursion;
  upload_masks(device, stream);
  auto* const mapped = new (mapped_.data()) Mapped;
  report = &mapped->report;
  wrong_scale = &mapped->wrong_scale;
  Writer tables;
  // Codecs' tables first: at the start of their buffer, whose alignment is the tables'.
  struct Table {
    ConstBytes* out;
    std::size_t at, bytes;
  };
  std::vector<Table> codec_tables;
  const auto tabulate = [&](const Recursion& of_states, Plan view, std::span<const Segment> segments, std::span<const SegmentState> states,
                            ConstBytes* out) {
    view.segments = segments;
    std::vector<std::byte> table(codec->table_bytes(view));
    codec->tabulate(of_states, view, states, table.data());
    codec_tables.push_back({out, tables.append(table.data(), table.size()), table.size()});
  };
  if (codec != nullptr && !plan.whole_dense) {
    tabulate(recursion, plan.mean_plan(0, 1.0f), segments_, plan.states, &codec_table_);
    if (plan.two_phase) {
      Recursion taken = kOwner;
      taken.averaged = recursion.averaged;
      tabulate(kOwner, plan.own_part(0), own_, plan.phases.own_states, &own_table_);
      tabulate(taken, plan.own_part(0), own_, plan.phases.own_taken, &taken_table_);
    }
    if (!plan.momenta.empty()) tabulate(Recursion{}, plan.plan(0), momentum_segments_, {}, &momentum_table_);
  }
  struct Betas {
    const float** out;
    std::size_t at;
  };
  std::vector<Betas> beta_arrays;
  const auto append_betas = [&](const std::vector<float>& values, const float** out) {
    beta_arrays.push_back({out, tables.append(values.data(), 4 * values.size())});
  };
  append_betas(plan.betas, &betas);
  append_betas(plan.phases.own_betas, &own_betas);
  append_betas(plan.passengers[0].betas, &passenger_betas);
  {
    std::vector<DeviceDense> all, dense;
    std::vector<float> values;
    std::size_t packed = 0, masked = 0;
    for (const SharedMomentum& shared : plan.momenta) {
      DeviceDense one;
      one.range.first = shared.first;
      one.range.count = shared.count;
      one.factor = std::uint32_t(values.size());
      one.packed = packed;
      one.message = shared.message;
      one.momentum = shared.momentum;
      if (shared.live != nullptr) one.live = reinterpret_cast<const std::uint8_t*>(masks_.data() + masked);
      masked += shared.live != nullptr ? round_up(shared.count, 128) / 8 : 0;
      packed += shared.count;
      values.push_back(shared.beta1);
      all.push_back(one);
      if (shared.dense) dense.push_back(one);
    }
    append_betas(values, &momenta_betas);
    tables.append(std::move(all), &momenta);
    tables.append(std::move(dense), &dense_momenta);
    std::vector<DeviceDense> held, sent_held;
    append_server(plan.passengers[0], 0, &held);
    for (std::size_t owner = 0; owner < plan.shares.size(); ++owner)
      append_server(plan.shares[owner].parts[0], plan.share_first[owner] / sizeof(float), &sent_held);
    tables.append(std::move(held), &server);
    tables.append(std::move(sent_held), &sent_server);
  }
  for (int g = 0; g < 2; ++g) {
    std::vector<DeviceDense> dense;
    append_group(plan.passengers[g], recursion, 0, &dense);
    tables.append(std::move(dense), &whole[g]);
  }
  {
    std::vector<DeviceDense> dense;
    // Norms and factors are of whole parameters.
    const std::vector<Segment>& normed = plan.two_phase ? plan.phases.whole : plan.segments;
    for (std::size_t s = 0; s < normed.size(); ++s) dense.push_back(dense_of(normed[s], {}, {}, s, 0));
    tables.append(std::move(dense), &whole[2]);
  }
  std::size_t watched_at = 0;
  if (recursion.kind == Recursion::Kind::estimate || watch != nullptr) {
    std::vector<DeviceDense> dense;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      dense.push_back(dense_of(segments_[s], plan.states[s], recursion, s, 0));
      dense.back().eta = segments_[s].setting.eta;
      dense.back().live = segments_[s].live;
    }
    tables.append(std::move(dense), &compressed);
    // Of cut ones the first parts.
    if (watch != nullptr) watch->describe(std::span(segments_).first(whole[2].segments), &watched);
    watched_at = tables.append(watched.data(), watched.size() * sizeof(WatchedSegment));
  }
  if (plan.owners) {
    const std::size_t size = size_of(plan.dtype);
    std::vector<DeviceDense> parts;
    for (std::size_t g = 0; g < 2; ++g) {
      std::vector<DeviceDense> dense;
      for (std::size_t r = 0; r < plan.shares.size(); ++r) {
        const auto& share = plan.shares[r].parts;
        append_group(share[g], recursion, (plan.share_first[r] + (g == 0 ? 0 : share[0].bytes())) / size_of(share[g].dtype), &dense);
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
  for (const auto& [out, at, bytes] : codec_tables) *out = {tables_.data() + at, bytes, DType::u8, Place::cuda, device};
  watched_table = reinterpret_cast<const WatchedSegment*>(tables_.data() + watched_at);
  for (const auto& [out, at] : beta_arrays) *out = reinterpret_cast<const float*>(tables_.data() + at);

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
    factors_at[g] = place(4 * std::max(whole[g].segments, g == 2 ? plan.segments.size() : 0));
    chunks = std::max(chunks, whole[g].chunks);
  }
  const std::size_t sums_at = place(8 * chunks), probes_at = place(watched.empty() ? 0 : 8 * kProbeSums * compressed.chunks);
  arrays_.reserve(end, device);
  device_clear(arrays_.bytes(), stream);
  const auto pointer = [&]<class T>(std::size_t at, T*& out) { out = reinterpret_cast<T*>(arrays_.data() + at); };
  pointer(flags_at, flags);
  pointer(scales_at, scales);
  pointer(kept_at, kept);
  pointer(sums_at, block_sums);
  pointer(probes_at, probe_sums);
  for (int g = 0; g < 3; ++g) {
    pointer(norms_at[g], norms[g]);
    pointer(factors_at[g], factors[g]);
  }
  device_wait(stream);  // the host's tables end here
}

Plan DevicePlan::with(Plan plan, ConstBytes table, const float* factor) const noexcept {
  plan.table = table;
  plan.report = report;
  plan.factor = factor;
  return plan;
}

Plan DevicePlan::plan(std::uint64_t step) const noexcept {
  Plan out = with(bucket->plan(step), codec_table_, bucket->two_phase ? &scales->loss : &scales->mean);
  out.segments = segments_;
  return out;
}

Plan DevicePlan::mean_plan(std::uint64_t step) const noexcept {
  Plan out = plan(step);
  if (bucket->mean_estimates.empty()) return out;
  out.mean_estimates = bucket->mean_estimates;
  out.factor = nullptr;  // true units: the loss scale comes last
  out.output_factor = &scales->loss;
  return out;
}

Plan DevicePlan::own_part(std::uint64_t step) const noexcept {
  Plan out = with(bucket->own_part(step), own_table_, nullptr);
  out.segments = own_;
  if (!bucket->mean_estimates.empty()) return out;  // the mean goes on into them, in true units and fp32
  out.output.dtype = bucket->dtype;
  out.output_factor = &scales->loss;
  return out;
}

Plan DevicePlan::own_taken(std::uint64_t step) const noexcept {
  Plan out = own_part(step);
  out.table = taken_table_;
  return out;
}

Plan DevicePlan::momentum_plan(std::uint64_t step) const noexcept {
  Plan out = with(bucket->plan(step), momentum_table_, nullptr);
  out.segments = momentum_segments_;
  return out;
}

}  // namespace thinwire
