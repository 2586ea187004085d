#pragma once
// One rank's side of top-k in a test: a plan of segments with gaps between them in a flat buffer, its state, and calls that check what
// every call promises.

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "compressors/core/codec.hpp"
#include "compressors/topk/topk.hpp"
#include "compressors/topk/topk_cuda.hpp"
#include "tests/codec_backends.hpp"
#include "tests/device_codec.hpp"
#include "tests/topk_oracle.hpp"

namespace thinwire {

inline std::unique_ptr<const Codec> make_on(Backend backend, const TopKOptions& options) {
  return backend.cuda ? on_device(make_topk_cuda(options)) : make_topk(options, backend.isa);
}

struct TopKRig {
  TopKOptions options;
  Recursion recursion;
  std::vector<Segment> segments;
  std::vector<std::uint32_t> part_end;
  std::unique_ptr<const Codec> codec;
  std::vector<std::vector<float>> u, residual, estimate, mean_estimate, average;
  std::vector<float> memory, factors;
  std::vector<SegmentState> states;
  StoredState stored;
  std::vector<std::byte> workspace, payload;
  std::vector<std::uint32_t> kept;
  std::vector<double> norms;
  std::size_t numel = 0;
  std::uint64_t step = 0;
  std::uint32_t flags = 0;

  TopKRig(Backend backend, const TopKOptions& o, const Recursion& r, const std::vector<std::size_t>& counts, double density)
      : options(o), recursion(r), codec(make_on(backend, o)) {
    for (std::size_t s = 0; s < counts.size(); ++s) {
      Segment segment;
      segment.parameter = std::uint32_t(s + 3);
      segment.first = numel + 1;  // odd starts: nothing may need alignment
      segment.count = counts[s];
      segment.setting.density = density;
      segment.setting.eta = eta_at(s);
      segments.push_back(segment);
      numel = segment.first + segment.count;
    }
    numel += 1;
    part_end = {std::uint32_t(segments.size())};
    memory.assign(segments.size(), 0);
    factors.assign(segments.size(), 1);
    for (const auto& segment : segments)
      for (auto* array : arrays()) array->emplace_back(segment.count, 0.0f);
    kept.assign(segments.size(), 0);
    norms.assign(segments.size(), -1);
  }

  std::array<std::vector<std::vector<float>>*, 5> arrays() { return {&u, &residual, &estimate, &mean_estimate, &average}; }
  /// State as if after many steps.
  void age(unsigned seed, bool wild) {
    for (std::size_t s = 0; s < segments.size(); ++s)
      for (auto* array : arrays()) (*array)[s] = held_values(segments[s].count, seed++, wild);
    state();
    stored.fetch();  // as they can be held
  }
  oracle::Held held(std::size_t s, std::size_t i) const { return {u[s][i], residual[s][i], estimate[s][i], average[s][i]}; }
  void hold(std::size_t s, std::size_t i, const oracle::Held& held) {
    u[s][i] = held.u, residual[s][i] = held.residual, estimate[s][i] = held.estimate, average[s][i] = held.average;
  }

  Plan plan() const { return {segments, part_end, step}; }
  StateView state() {
    states.assign(segments.size(), {});
    stored.clear();
    for (std::size_t s = 0; s < segments.size(); ++s) {
      if (recursion.kind == Recursion::Kind::error_feedback) states[s].array = {stored.of(residual[s], recursion.narrow)};
      if (recursion.kind == Recursion::Kind::momentum_correction) states[s].array = {u[s].data(), residual[s].data()};
      if (has_estimate(recursion)) {
        std::size_t next = 0;
        states[s].array[next++] = stored.of(estimate[s], recursion.grid);
        states[s].array[next++] = mean_estimate[s].data();
        if (recursion.control) states[s].array[next++] = stored.of(residual[s], recursion.narrow);
        if (recursion.fresh < 1) states[s].array[next++] = average[s].data();
      }
      if (codec->memory(segments[s]) != 0) states[s].memory = &memory[s];
    }
    return {states, factors.data()};
  }
  /// A workspace and payload full of rubbish, so that what is not written shows.
  void prepare() {
    const WireLayout layout = codec->layout(plan());
    workspace.assign(layout.workspace, std::byte{0xa5});
    payload.assign(layout.part_capacity, std::byte{0xa5});
  }
  Bytes bytes(std::vector<std::byte>& v) { return {v.data(), v.size(), DType::u8, Place::host, 0}; }

  void stream(const std::vector<std::byte>& grad, DType dtype, std::uint32_t given = 0) {
    prepare();
    flags = given;
    codec->stream(recursion, plan(), {grad.data(), grad.size(), dtype, Place::host, 0}, state(), bytes(workspace), bytes(payload), &flags,
                  {kept.data(), norms.data()}, Stream::host());
    stored.fetch();
    expect_norms({grad.data(), grad.size(), dtype, Place::host, 0});
  }
  void expect_norms(ConstBytes grad) const {
    std::vector<double> apart(segments.size());
    squared_norms(plan(), grad, apart.data(), Stream::host());
    EXPECT_EQ(norms, apart);
  }
  void stream(const std::vector<float>& grad) { stream(oracle::to_bytes(grad, DType::fp32), DType::fp32); }
  std::vector<std::vector<oracle::Entry>> entries() const { return oracle::parse(payload, plan(), options); }

  std::vector<float> decode(const std::vector<std::vector<std::byte>>& payloads, float factor = 1) {
    std::vector<ConstBytes> wires;
    for (const auto& p : payloads) wires.push_back({p.data(), p.size(), DType::u8, Place::host, 0});
    std::vector<float> out(numel, kGap);
    workspace.assign(codec->layout(plan()).workspace, std::byte{0xa5});
    codec->decode(plan(), wires, factor, bytes(workspace), host_bytes(out.data(), out.size()), &flags, Stream::host());
    return out;
  }
  void take_back() {
    codec->take_back(recursion, plan(), {payload.data(), payload.size(), DType::u8, Place::host, 0}, state(), nullptr, Stream::host());
    stored.fetch();
  }
};

inline Recursion dgc(float momentum = 0.5f, bool nesterov = false, bool mask = true) {
  Recursion r;
  r.kind = Recursion::Kind::momentum_correction;
  r.momentum = momentum;
  r.nesterov = nesterov;
  r.mask = mask;
  return r;
}
inline std::vector<Recursion> all_recursions() {
  return {no_feedback(),
          ef14(),
          ef14(0.75f),
          dgc(),
          dgc(0.9f, false, false),
          dgc(0.5f, true),
          dgc(0.9f, true, false),
          ef21(),
          ef21(0.25f),
          econtrol(),
          econtrol(0.1f),
          narrow(ef14()),
          narrow(econtrol()),
          on_grid(ef21(0.25f)),
          on_grid(narrow(econtrol(0.1f)))};
}
inline std::string describe(const TopKOptions& o) {
  return std::string(" wire ") + to_string(o.wire) + (o.exact ? " exact" : " sampled") + " index " + std::to_string(int(o.index));
}

inline const std::vector<DType>& kWires = kTypes;

}  // namespace thinwire
