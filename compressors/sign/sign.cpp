#include "compressors/sign/sign.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "compressors/core/codec_checks.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/rounding.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/feedback/squared_norm.hpp"
#include "compressors/sign/sign_kernels.hpp"
#include "compressors/sign/sign_math.hpp"
#include "compressors/sign/sign_wire.hpp"

namespace thinwire {
namespace sign {

const Kernels& kernels(Isa isa) {
  THINWIRE_EXPECTS(cpu_supports(isa), std::string("sign: this CPU does not support ") + to_string(isa));
  return isa == Isa::avx512 ? kernels_avx512() : isa == Isa::avx2 ? kernels_avx2() : kernels_scalar();
}

}  // namespace sign

namespace {

using namespace sign;

constexpr CodecChecks kChecks{"sign"};

std::size_t live_among(const std::uint8_t* live, std::size_t count) noexcept {
  if (live == nullptr) return count;
  std::size_t out = 0;
  for (std::size_t i = 0; i < count / 8; ++i) out += std::size_t(std::popcount(live[i]));
  for (std::size_t i = count / 8 * 8; i < count; ++i) out += is_live(live, i) ? 1 : 0;
  return out;
}

/// One segment's pass.
struct SegmentPass {
  const Kernels& kernels;
  Scale scale;
  Form form;
  DType dtype;  ///< of the gradient
  Chunk whole;  ///< the segment as one chunk, of any length; without a residual that is narrow
  StateArray residual;
  feedback::SquaredNorm* norm;
  ConstBytes grad;  ///< the flat buffer and the segment's place in it: for the norm
  std::size_t first;
  std::size_t normed = 0;
  std::uint32_t flags = 0;
  alignas(64) std::array<float, kSumBlock> widened{};  ///< the narrow residual of the piece under way

  /// Elements [from, from + count) of a chunk; its mask is the caller's where `from` is in the middle of a byte.
  Chunk part_of(Chunk chunk, std::size_t from, std::size_t count) const noexcept {
    chunk.grad = static_cast<const std::byte*>(chunk.grad) + from * size_of(dtype);
    if (chunk.momentum != nullptr) chunk.momentum += from;
    for (float** array : {&chunk.residual, &chunk.estimate, &chunk.average})
      if (*array != nullptr) *array += from;
    if (chunk.live != nullptr) chunk.live += from / 8;
    chunk.count = count;
    return chunk;
  }
  Chunk at(std::size_t from, std::size_t count) noexcept {
    Chunk chunk = part_of(whole, from, count);
    if (residual.narrow()) chunk.residual = widened.data();
    return chunk;
  }

  /// The sum of the block's weights in double, where fp32's does not hold it: messages are read from the residual, or made again.
  double wide_sum(const Chunk& chunk) const noexcept {
    double sum = 0;
    for (std::size_t i = 0; i < chunk.count; ++i) {
      if (!is_live(chunk.live, i)) continue;
      float x;
      if (keeps_message(form)) {
        x = chunk.residual[i];
      } else {
        Chunk one = part_of(chunk, i, 1);
        one.live = nullptr;  // made again, alone: no kernel keeps messages of these forms
        float partial[kPartials] = {};
        std::uint8_t bit;
        range_kernel(Scale::l1, form, dtype)(one, 0, 1, partial, &bit);
        x = partial[0];
      }
      const double magnitude = x < 0 ? -double(x) : double(x);
      sum += scale == Scale::l1 ? magnitude : magnitude * magnitude;
    }
    return sum;
  }

  /// Elements [from, from + count), at most kSumBlock: their messages and bits. @returns the sum of their weights.
  double encode(std::size_t from, std::size_t count, std::uint8_t* bits) noexcept {
    if (norm != nullptr && from + count > normed) {  // in pieces of kSumBlock, just ahead of the pass
      const std::size_t piece = std::min(kSumBlock, whole.count - normed);
      norm->add(grad, first + normed, piece);
      normed += piece;
    }
    if (residual.narrow()) load_state(residual.from(from), widened.data(), count);
    const Chunk chunk = at(from, count);
    std::array<float, kPartials> partial{};
    flags |= kernels.encode[std::size_t(scale)][std::size_t(form)][std::size_t(dtype)](chunk, partial.data(), bits);
    const float sum = add_in_halves(partial.data());
    return is_finite(sum) ? double(sum) : wide_sum(chunk);
  }

  /// A block of any length. @returns the sum of its weights.
  double encode_block(std::size_t from, std::size_t count, std::uint8_t* bits) noexcept {
    if (count <= kSumBlock) return encode(from, count, bits);
    std::array<double, kPartials> partial{};
    for (std::size_t i = 0, block = 0; i < count; i += kSumBlock, ++block)
      partial[block % kPartials] += encode(from + i, std::min(kSumBlock, count - i), bits + i / 8);
    return add_in_halves(partial.data());
  }

  /// What a block keeps, once its bits and scale are known.
  void settle(const Chunk& chunk, const std::uint8_t* bits, float scale_sent) noexcept {
    if (feedback::has_estimate(form)) {
      kernels.commit[std::size_t(form)][std::size_t(dtype)](chunk, bits, scale_sent);
    } else if (chunk.residual != nullptr) {
      kernels.leave(chunk.residual, chunk.live, chunk.count, scale_sent);
    }
  }
  void settle_block(std::size_t from, std::size_t count, std::uint8_t* bits, float scale_sent) noexcept {
    if (!residual.narrow()) return settle(at(from, count), bits, scale_sent);
    // One piece is here still. Of more, the messages are made again: bf16 does not hold them.
    const bool here = count <= kSumBlock;
    for (std::size_t i = 0; i < count; i += kSumBlock) {
      const std::size_t n = std::min(kSumBlock, count - i);
      if (!here) encode(from + i, n, bits + i / 8);
      settle(at(from + i, n), bits + i / 8, scale_sent);
      store_state(widened.data(), residual.from(from + i), n);
    }
  }
};

class Sign final : public Codec {
 public:
  Sign(const SignOptions& options, Isa isa) : options_(options), kernels_(kernels(isa)) {}

  Combine combine() const noexcept override { return Combine::reencode; }
  std::size_t memory(const Segment&) const noexcept override { return 0; }
  const char* memory_name() const noexcept override { return ""; }
  double nominal_delta(const Segment&) const noexcept override { return kSignDelta; }
  std::size_t target(const Segment& segment) const noexcept override { return segment.count; }

  WireLayout layout(const Plan& plan) const override {
    return {part_capacity(plan, options_), kAlignment, sizeof(const std::uint8_t*) + sizeof(float)};
  }

  void stream(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes, Bytes wire,
              std::uint32_t* flags, const PassCounts& counts, Stream) const override {
    run(recursion, plan, grad, state, wire, flags, counts);
  }

  void empty(const Plan& plan, Bytes wire, std::uint32_t flags, Stream) const override {
    const std::size_t capacity = part_capacity(plan, options_);
    kChecks.payload_size(wire.size, capacity * parts_of(plan));
    std::memset(wire.data, 0, wire.size);
    write_headers(plan, capacity, wire, flags);
  }

  void encode(int round, const Plan& plan, ConstBytes message, ConstBytes, const StateView&, Bytes, Bytes wire, Stream) const override {
    kChecks.message(round, message);
    run(Recursion{}, plan, message, {}, wire, nullptr, {});
  }

  void decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
              Stream) const override;
  void take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state, const std::uint32_t* verdict,
                 Stream) const override;

 private:
  static constexpr std::size_t kAlignment = 64;

  void run(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes wire, std::uint32_t* flags,
           const PassCounts& counts) const;
  void write_headers(const Plan& plan, std::size_t capacity, Bytes wire, std::uint32_t flags) const {
    for (std::size_t r = 0; r < parts_of(plan); ++r)
      wire::write_header(payload_header(plan, part_of(plan, r), options_, capacity, flags), wire.sub(r * capacity, capacity));
  }

  /// Part r as a plan of its own.
  static Plan alone(const Plan& plan, std::size_t r) {
    Plan part = plan;
    part.segments = part_of(plan, r);
    part.part_end = {};
    if (!plan.mean_estimates.empty())
      part.mean_estimates = plan.mean_estimates.subspan(std::size_t(part.segments.data() - plan.segments.data()), part.segments.size());
    return part;
  }
  /// decode() of one part, after the payloads were checked. @returns the flags of the output.
  std::uint32_t add_up(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out) const;
  /// Elements [from, from + count) of segment s: the ranks' mean goes to where H lies, and H to `out`. @returns whether all of out is
  /// finite.
  bool add_to_estimate(const Plan& plan, std::size_t s, std::size_t from, Peers peers, std::size_t count, float factor, Bytes out) const;

  SignOptions options_;
  const Kernels& kernels_;
};

void Sign::run(const Recursion& recursion, const Plan& plan, ConstBytes grad, const StateView& state, Bytes wire, std::uint32_t* flags,
               const PassCounts& counts) const {
  const std::size_t capacity = part_capacity(plan, options_);
  kChecks.payload_size(wire.size, capacity * parts_of(plan));
  kChecks.input(plan, grad);
  kChecks.state(plan, recursion, state.segments.size());
  const Form form = feedback::form_of(recursion);
  check_recursion(recursion, plan, state);

  std::uint32_t found = flags != nullptr ? *flags : 0;
  std::size_t s = 0;
  for (std::size_t r = 0; r < parts_of(plan); ++r) {
    const std::span<const Segment> part = part_of(plan, r);
    const PartWire layout = part_wire(part, options_);
    std::byte* scales = wire.data + r * capacity + sizeof(wire::Header);
    auto* bits = reinterpret_cast<std::uint8_t*>(wire.data + r * capacity + layout.bits_offset());
    for (const Segment& segment : part) {
      const SegmentState own = state.segments.empty() ? SegmentState{} : state.segments[s];
      feedback::SquaredNorm norm;
      SegmentPass pass{
          kernels_, options_.scale, form, grad.dtype, {}, residual_of(recursion, own), counts.norms != nullptr ? &norm : nullptr,
          grad,     segment.first};
      pass.whole.grad = grad.data + segment.first * size_of(grad.dtype);
      pass.whole.momentum = recursion.averaged ? own.array[0].fp32() : nullptr;
      pass.whole.residual = pass.residual.fp32();
      pass.whole.estimate = estimate_of(recursion, own).fp32();
      pass.whole.average = average_of(recursion, own);
      pass.whole.live = segment.live;
      pass.whole.count = segment.count;
      pass.whole.factor = state.grad_factor != nullptr ? state.grad_factor[s] : 1.0f;
      pass.whole.rate =
          feedback::has_estimate(form) ? feedback::limited_eta(segment.setting.eta, own.eta_limit) : feedback::rate_of(recursion);
      pass.whole.keep = average_shares(recursion).keep;
      pass.whole.fresh = average_shares(recursion).fresh;
      pass.whole.beta = recursion.averaged ? state.beta1[s] : 0.0f;
      const std::size_t block = block_of(options_, segment.count);
      for (std::size_t from = 0; from < segment.count; from += block) {
        const std::size_t count = std::min(block, segment.count - from);
        const double sum = pass.encode_block(from, count, bits + from / 8);
        const std::uint8_t* const live = segment.live != nullptr ? segment.live + from / 8 : nullptr;
        const float scale = fit(scale_of(sum, live_among(live, count), options_.scale), plan.output);
        pass.settle_block(from, count, bits + from / 8, scale);
        std::memcpy(scales, &scale, 4);
        scales += 4;
      }
      bits += bit_bytes(segment.count);
      found |= pass.flags;
      if (counts.kept != nullptr) counts.kept[s] = std::uint32_t(std::min<std::size_t>(segment.count, UINT32_MAX));
      if (counts.norms != nullptr) counts.norms[s] = norm.sum();
      ++s;
    }
    std::byte* const end = wire.data + (r + 1) * capacity;
    std::memset(bits, 0, std::size_t(end - reinterpret_cast<std::byte*>(bits)));
  }
  write_headers(plan, capacity, wire, found);
  if (flags != nullptr) *flags = found;
}

bool Sign::add_to_estimate(const Plan& plan, std::size_t s, std::size_t from, Peers peers, std::size_t count, float factor,
                           Bytes out) const {
  alignas(64) std::array<float, kSumBlock> means;  // in L1
  std::byte* const to = out.data + (plan.segments[s].first + from) * size_of(out.dtype);
  bool finite = true;
  for (std::size_t i = 0; i < count; i += means.size()) {
    const std::size_t n = std::min(means.size(), count - i);
    Peers piece = peers;
    piece.offset += i / 8;
    if (piece.live != nullptr) piece.live += i / 8;
    kernels_.decode[std::size_t(DType::fp32)](piece, n, factor, means.data(), false);
    add_to_mean_estimate(means.data(), 1.0f, plan.mean_estimates[s] + from + i, n);
    finite &= store_scaled(means.data(), plan.output.factor, out.dtype, to + i * size_of(out.dtype), n);
  }
  return finite;
}

void Sign::decode(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out, std::uint32_t* flags,
                  Stream) const {
  const bool apart = parts_of(plan) > 1;
  THINWIRE_EXPECTS(!apart || wires.size() == parts_of(plan),
                   "sign: " + std::to_string(wires.size()) + " payloads for a plan of " + std::to_string(parts_of(plan)) + " parts");
  kChecks.output(plan, out);
  kChecks.workspace(workspace.size, (apart ? 1 : wires.size()) * (sizeof(const std::uint8_t*) + sizeof(float)));
  std::uint32_t found = 0;
  // All payloads before the first is decoded: what is refused has written nothing.
  for (std::size_t r = 0; r < wires.size(); ++r) found |= check_payload(apart ? alone(plan, r) : plan, options_, wires[r], r);
  if (wires.empty()) return;
  for (std::size_t r = 0; r < wires.size() && apart; ++r) found |= add_up(alone(plan, r), wires.subspan(r, 1), factor, workspace, out);
  if (!apart) found |= add_up(plan, wires, factor, workspace, out);
  kernels_.fence();
  if (flags != nullptr) *flags |= found;
}

std::uint32_t Sign::add_up(const Plan& plan, std::span<const ConstBytes> wires, float factor, Bytes workspace, Bytes out) const {
  std::uint32_t found = 0;
  auto** bits = reinterpret_cast<const std::uint8_t**>(workspace.data);
  auto* scales = reinterpret_cast<float*>(workspace.data + wires.size() * sizeof *bits);
  const PartWire layout = part_wire(plan.segments, options_);
  std::size_t scale = 0, offset = layout.bits_offset();
  for (const Segment& segment : plan.segments) {
    const std::size_t block = block_of(options_, segment.count);
    const bool streaming = segment.count * size_of(out.dtype) >= kOutputStreams;
    for (std::size_t r = 0; r < wires.size(); ++r) bits[r] = reinterpret_cast<const std::uint8_t*>(wires[r].data + offset);
    for (std::size_t from = 0; from < segment.count; from += block, ++scale) {
      for (std::size_t r = 0; r < wires.size(); ++r) std::memcpy(&scales[r], wires[r].data + sizeof(wire::Header) + 4 * scale, 4);
      const Peers peers{bits, from / 8, scales, wires.size(), segment.live != nullptr ? segment.live + from / 8 : nullptr};
      const std::size_t count = std::min(block, segment.count - from);
      if (!plan.mean_estimates.empty()) {
        const std::size_t s = std::size_t(&segment - plan.segments.data());
        if (!add_to_estimate(plan, s, from, peers, count, factor, out)) found |= kFlagNonfinite;
        continue;
      }
      if (!kernels_.decode[std::size_t(out.dtype)](peers, count, factor, out.data + (segment.first + from) * size_of(out.dtype), streaming))
        found |= kFlagNonfinite;
    }
    offset += bit_bytes(segment.count);
  }
  return found;
}

void Sign::take_back(const Recursion& recursion, const Plan& plan, ConstBytes own_wire, const StateView& state,
                     const std::uint32_t* verdict, Stream) const {
  if (verdict != nullptr && (*verdict & kFlagNonfinite) == 0) return;
  const std::size_t capacity = part_capacity(plan, options_);
  kChecks.payload_size(own_wire.size, capacity * parts_of(plan));
  if (recursion.kind == Recursion::Kind::estimate) return keep_news(recursion, plan, state);
  if (!feedback::has_residual(feedback::form_of(recursion))) return;
  kChecks.state(plan, recursion, state.segments.size());
  check_recursion(recursion, plan, state);
  std::size_t s = 0;
  for (std::size_t r = 0; r < parts_of(plan); ++r) {
    const std::span<const Segment> part = part_of(plan, r);
    const ConstBytes wire = own_wire.sub(r * capacity, capacity);
    check_payload(alone(plan, r), options_, wire, 0);
    const std::byte* scales = wire.data + sizeof(wire::Header);
    const auto* bits = reinterpret_cast<const std::uint8_t*>(wire.data + part_wire(part, options_).bits_offset());
    for (const Segment& segment : part) {
      const std::size_t block = block_of(options_, segment.count);
      const StateArray residual = residual_of(recursion, state.segments[s]);
      const float* const momentum = recursion.averaged ? state.segments[s].array[0].fp32() : nullptr;
      for (std::size_t i = 0; i < segment.count; ++i) {
        if (!is_live(segment.live, i)) continue;
        float scale;
        std::memcpy(&scale, scales + 4 * (i / block), 4);
        float x = residual[i] + value_of(((bits[i / 8] >> (i % 8)) & 1u) != 0, scale);
        // The momentum has not moved: the next message will hold beta1·m again.
        if (momentum != nullptr) x -= state.beta1[s] * momentum[i];
        residual.set(i, x);
      }
      scales += 4 * scales_of(options_, segment.count);
      bits += bit_bytes(segment.count);
      ++s;
    }
  }
}

}  // namespace

std::unique_ptr<const Codec> make_sign(const SignOptions& options, Isa isa) {
  check_options(options);
  return std::make_unique<Sign>(options, isa);
}

}  // namespace thinwire
