#pragma once
// One rank's side of the sign codec in a test: a plan of segments with gaps between them in a flat buffer, in one part or several, its
// state, and the same step by the oracle.

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compressors/core/codec.hpp"
#include "compressors/sign/sign.hpp"
#include "compressors/sign/sign_cuda.hpp"
#include "tests/codec_backends.hpp"
#include "tests/device_codec.hpp"
#include "tests/sign_oracle.hpp"

namespace thinwire {

using Scale = SignOptions::Scale;
inline std::unique_ptr<const Codec> make_on(Backend backend, const SignOptions& options) {
  return backend.cuda ? on_device(make_sign_cuda(options)) : make_sign(options, backend.isa);
}

inline SignOptions with(Scale scale, std::size_t block) {
  SignOptions o;
  o.scale = scale;
  o.block = block;
  return o;
}
inline const std::vector<Scale> kScales = {Scale::l1, Scale::l2};
inline const std::vector<std::size_t> kBlocks = {8, 24, 512, 1024, 4096, 5000, 8192, 0};  // 0: one per tensor

inline Recursion averaged(Recursion r) {
  r.averaged = true;
  return r;
}
inline std::vector<Recursion> sign_recursions() {
  return {no_feedback(), ef14(),     ef14(0.75f),    averaged(no_feedback()), averaged(ef14()),         averaged(ef14(0.75f)), ef21(),
          ef21(0.25f),   econtrol(), econtrol(0.1f), narrow(ef14(0.75f)),     narrow(averaged(ef14())), narrow(econtrol(0.1f))};
}
inline std::string describe(const SignOptions& o) {
  return std::string(o.scale == Scale::l1 ? " l1" : " l2") + " block " + std::to_string(o.block);
}

struct SignRig {
  SignOptions options;
  Recursion recursion;
  std::vector<Segment> segments;
  std::vector<std::uint32_t> part_end;
  std::unique_ptr<const Codec> codec;
  std::vector<std::vector<float>> momentum, residual, estimate, mean_estimate, average;
  std::vector<float> beta1, factors;
  std::vector<std::vector<std::uint8_t>> masks;
  std::vector<SegmentState> states;
  StoredState stored;
  std::vector<std::byte> workspace, payload;
  std::vector<std::uint32_t> kept;
  std::vector<double> norms;
  Output output;
  std::size_t numel = 0;
  std::uint64_t step = 0;
  std::uint32_t flags = 0;

  /// @param ends where the parts end, in segments; empty: one part
  SignRig(Backend backend, const SignOptions& o, const Recursion& r, const std::vector<std::size_t>& counts,
          std::vector<std::uint32_t> ends = {})
      : options(o), recursion(r), part_end(std::move(ends)), codec(make_on(backend, o)) {
    for (std::size_t s = 0; s < counts.size(); ++s) {
      Segment segment;
      segment.parameter = std::uint32_t(s + 3);
      segment.first = numel + 1;  // odd starts: nothing may need alignment
      segment.count = counts[s];
      segment.setting.eta = eta_at(s);
      segments.push_back(segment);
      numel = segment.first + segment.count;
    }
    numel += 1;
    if (part_end.empty()) part_end = {std::uint32_t(segments.size())};
    factors.assign(segments.size(), 1);
    for (std::size_t s = 0; s < segments.size(); ++s) beta1.push_back(s % 2 == 0 ? 0.9f : 0.5f);
    for (const auto& segment : segments)
      for (auto* array : arrays()) array->emplace_back(segment.count, 0.0f);
    kept.assign(segments.size(), 0);
    norms.assign(segments.size(), -1);
  }

  /// Kills about a quarter of the elements; of every fifth segment none, and of every fifth all.
  void mask(unsigned seed) {
    std::mt19937 random(seed);
    masks.clear();
    for (const auto& segment : segments) {
      auto& mask = masks.emplace_back(segment.count / 8 + 9);
      for (auto& byte : mask) byte = std::uint8_t(random() | random());
      if (masks.size() % 5 == 0) mask.assign(mask.size(), 0);
    }
    for (std::size_t s = 0; s < segments.size(); ++s) segments[s].live = s % 5 == 1 ? nullptr : masks[s].data();
  }
  std::array<std::vector<std::vector<float>>*, 5> arrays() { return {&momentum, &residual, &estimate, &mean_estimate, &average}; }
  /// State as if after many steps.
  void age(unsigned seed, bool wild = false) {
    for (std::size_t s = 0; s < segments.size(); ++s) {
      unsigned own = seed + unsigned(s);
      for (auto* array : arrays()) {
        (*array)[s] = held_values(segments[s].count, own, wild);
        own += 100;
      }
    }
    state();
    stored.fetch();  // as they can be held
  }
  bool alive(std::size_t s, std::size_t i) const { return segments[s].live == nullptr || ((segments[s].live[i / 8] >> (i % 8)) & 1u) != 0; }

  Plan plan() const {
    Plan out{segments, part_end, step};
    out.output = output;
    return out;
  }
  std::size_t parts() const { return part_end.size(); }
  std::span<const Segment> part(std::size_t r) const {
    const std::size_t first = r == 0 ? 0 : part_end[r - 1];
    return std::span(segments).subspan(first, part_end[r] - first);
  }
  StateView state() {
    states.assign(segments.size(), {});
    stored.clear();
    for (std::size_t s = 0; s < segments.size(); ++s) {
      std::size_t next = 0;
      if (recursion.averaged) states[s].array[next++] = momentum[s].data();
      if (has_estimate(recursion)) states[s].array = {estimate[s].data(), mean_estimate[s].data()}, next = 2;
      if (recursion.kind == Recursion::Kind::error_feedback || recursion.control)
        states[s].array[next++] = stored.of(residual[s], recursion.narrow);
      if (has_estimate(recursion) && recursion.fresh < 1) states[s].array[next++] = average[s].data();
    }
    return {states, factors.data(), beta1.data()};
  }
  /// A workspace and payload full of rubbish, so that what is not written shows.
  void prepare() {
    const WireLayout layout = codec->layout(plan());
    workspace.assign(layout.workspace, std::byte{0xa5});
    payload.assign(layout.part_capacity * parts(), std::byte{0xa5});
  }
  static Bytes bytes(std::vector<std::byte>& v) { return {v.data(), v.size(), DType::u8, Place::host, 0}; }
  static ConstBytes bytes(const std::vector<std::byte>& v, DType dtype = DType::u8) { return {v.data(), v.size(), dtype, Place::host, 0}; }

  void stream(const std::vector<std::byte>& grad, DType dtype, std::uint32_t given = 0) {
    prepare();
    flags = given;
    codec->stream(recursion, plan(), bytes(grad, dtype), state(), bytes(workspace), bytes(payload), &flags, {kept.data(), norms.data()},
                  Stream::host());
    stored.fetch();
    std::vector<double> apart(segments.size());
    squared_norms(plan(), bytes(grad, dtype), apart.data(), Stream::host());
    EXPECT_EQ(norms, apart);
    for (std::size_t s = 0; s < segments.size(); ++s) EXPECT_EQ(kept[s], segments[s].count);
  }
  void stream(const std::vector<float>& grad) { stream(oracle::to_bytes(grad, DType::fp32), DType::fp32); }

  /// What the payload says, segment by segment over all parts.
  std::vector<oracle::Signs> signs() const {
    std::vector<oracle::Signs> out;
    const std::size_t capacity = payload.size() / parts();
    for (std::size_t r = 0; r < parts(); ++r) {
      for (auto& segment : oracle::parse_signs(std::span(payload).subspan(r * capacity, capacity), part(r), step, options))
        out.push_back(std::move(segment));
    }
    return out;
  }
  std::size_t block(std::size_t s) const { return oracle::sign_block(options, segments[s].count); }

  std::vector<std::byte> decode_as(DType dtype, const std::vector<std::vector<std::byte>>& payloads, float factor,
                                   std::vector<std::byte> out) {
    std::vector<ConstBytes> wires;
    for (const auto& p : payloads) wires.push_back(bytes(p));
    const WireLayout layout = codec->layout(plan());
    workspace.assign(std::max(layout.workspace, layout.per_payload * wires.size()), std::byte{0xa5});
    codec->decode(plan(), wires, factor, bytes(workspace), {out.data(), out.size(), dtype, Place::host, 0}, &flags, Stream::host());
    return out;
  }
  std::vector<float> decode(const std::vector<std::vector<std::byte>>& payloads, float factor = 1) {
    const auto out = decode_as(DType::fp32, payloads, factor, oracle::to_bytes(std::vector<float>(numel, kGap), DType::fp32));
    std::vector<float> floats(numel);
    std::memcpy(floats.data(), out.data(), out.size());
    return floats;
  }
  void take_back(const std::uint32_t* verdict = nullptr) {
    codec->take_back(recursion, plan(), bytes(std::as_const(payload)), state(), verdict, Stream::host());
    stored.fetch();
  }

  /// What one step must send and leave, by the oracle.
  struct Expected {
    std::vector<oracle::Signs> signs;
    std::vector<std::vector<float>> message, residual, estimate, average;  ///< message: NaN where dead
    std::uint32_t flags = 0;
  };
  Expected expect(const std::vector<std::byte>& grad, DType dtype) const {
    Expected out;
    out.residual = residual, out.estimate = estimate, out.average = average;
    for (std::size_t s = 0; s < segments.size(); ++s) {
      const std::size_t n = segments[s].count;
      auto& message = out.message.emplace_back(n, NAN);
      std::vector<float> magnitudes(n, 0.0f);
      std::vector<oracle::Estimated> estimated(has_estimate(recursion) ? n : 0);
      for (std::size_t i = 0; i < n; ++i) {
        if (!alive(s, i)) continue;
        const float g = oracle::element(grad, segments[s].first + i, dtype);
        bool nonfinite;
        if (has_estimate(recursion)) {
          estimated[i] =
              oracle::sign_estimate(recursion, g * factors[s], segments[s].setting.eta, residual[s][i], estimate[s][i], average[s][i]);
          message[i] = estimated[i].x;
          nonfinite = estimated[i].nonfinite;
        } else {
          const auto m = oracle::sign_message(recursion, g, factors[s], beta1[s], momentum[s][i], residual[s][i]);
          message[i] = m.x;
          nonfinite = m.nonfinite;
        }
        magnitudes[i] = std::fabs(message[i]);
        if (nonfinite) out.flags |= 1;
      }
      auto& sent = out.signs.emplace_back();
      sent.bits.resize(n);
      for (std::size_t from = 0; from < n; from += block(s)) {
        const std::size_t count = std::min(block(s), n - from);
        std::size_t live = 0;
        for (std::size_t i = from; i < from + count; ++i) live += alive(s, i) ? 1 : 0;
        sent.scales.push_back(oracle::scale_of(std::span(magnitudes).subspan(from, count), live, options, output));
      }
      for (std::size_t i = 0; i < n; ++i) {
        if (!alive(s, i)) continue;
        sent.bits[i] = !(message[i] < 0);
        const float w = sent.value(i, block(s));
        if (recursion.kind == Recursion::Kind::error_feedback) out.residual[s][i] = oracle::stored_value(message[i] - w, recursion.narrow);
        if (!has_estimate(recursion)) continue;
        estimated[i].send(w);
        if (recursion.control) out.residual[s][i] = oracle::stored_value(estimated[i].residual, recursion.narrow);
        out.estimate[s][i] = estimated[i].estimate;
        if (recursion.fresh < 1) out.average[s][i] = estimated[i].average;
      }
    }
    return out;
  }
};

}  // namespace thinwire
