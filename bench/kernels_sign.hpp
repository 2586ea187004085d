#pragma once
// The sign codec's kernels by name, through the codec's public interface.

#include <memory>
#include <string>
#include <vector>

#include "bench/kernels_pairing.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/sign/sign.hpp"

namespace thinwire::bench {

struct SignCase {
  std::string recursion = "ef14";  ///< none, ef14, averaged_ef14: 1-bit Adam's message beta1·m + (1 − beta1)·g
  std::string variant = {};        ///< appended to the name
  SignOptions options = {};
  Isa isa = Isa::scalar;

  /// Residuals of signs settle at about .8 of the message's norm (specs: behaviour of error feedback); Arrays::settle takes a density.
  static constexpr double kSettled = 0.29;

  std::string name() const { return recursion + "_sign" + (variant.empty() ? "" : "_" + variant); }
  /// Scales and bits per element, of so many.
  double wire_bytes(std::size_t numel) const noexcept;
};

/// Codec::stream: the pass that ships. Bytes: gradient, momentum (averaged) and residual read once, the residual written once, one bit per
/// element and 4 bytes per block written; the second look at a block, which is in cache by then, or not, is ours.
class SignKernel final : public Kernel {
 public:
  SignKernel(SignCase what, Arrays& arrays);
  std::string name() const override { return case_.name(); }
  const char* isa() const override { return to_string(case_.isa); }
  std::size_t numel() const override { return segment_.count; }
  double bytes_per_element() const override;
  void settle() override { arrays_.settle(recursion_, SignCase::kSettled); }
  void run(std::size_t repetition) override { stream(repetition, repetition); }

  /// One step: the gradient of this repetition's window, under this number in the payload's header.
  void stream(std::size_t window, std::uint64_t step);
  ConstBytes payload() const noexcept { return wire_.bytes().sub(0, capacity_); }
  const Codec& codec() const noexcept { return *codec_; }
  Plan plan() const noexcept { return plan_; }
  const Recursion& recursion() const noexcept { return recursion_; }
  StateView state() const noexcept { return {{&state_, 1}, nullptr}; }

 private:
  SignCase case_;
  Arrays& arrays_;
  Recursion recursion_;
  std::unique_ptr<const Codec> codec_;
  Segment segment_;
  std::uint32_t part_end_ = 1;
  Plan plan_;
  SegmentState state_;
  std::size_t capacity_ = 0;
  Buffer wire_, workspace_;
};

/// Codec::decode of several ranks' signs into one dense mean. Bytes: the output once, and all bits and scales.
class SignDecodeKernel final : public Kernel {
 public:
  SignDecodeKernel(int payloads, Isa isa, Arrays& arrays) : payloads_(payloads), sent_{.recursion = "none", .isa = isa}, arrays_(arrays) {}
  std::string name() const override { return "decode_sign_" + std::to_string(payloads_); }
  const char* isa() const override { return to_string(sent_.isa); }
  std::size_t numel() const override { return arrays_.numel(); }
  double bytes_per_element() const override;
  void settle() override;
  void run(std::size_t repetition) override;

 private:
  int payloads_;
  SignCase sent_;
  Arrays& arrays_;
  std::unique_ptr<SignKernel> sender_;
  std::vector<Buffer> storage_;
  std::vector<ConstBytes> wires_;
  Buffer workspace_;
};

}  // namespace thinwire::bench
