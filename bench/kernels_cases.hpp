#pragma once
// The kernels by name, through the codec's public interface: what a reducer calls is what is measured.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/kernels_pairing.hpp"
#include "compressors/core/codec.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire::bench {

/// "none", "ef14", "averaged_ef14", "dgc", "ef21" or "econtrol" with the defaults of the configuration grammar.
Recursion recursion_named(const std::string& name);

/// Its arrays among these two, as state_names has them in order; an estimate takes the momentum's place.
SegmentState state_in(const Recursion& recursion, float* momentum, float* residual, std::size_t first = 0) noexcept;
/// Bytes of state per element that a pass moves at least: each array read and written once; an averaged momentum is only read. An
/// estimate is written where something is sent: everywhere (`sends_all`), or with the entries.
double state_bytes(const Recursion& recursion, bool sends_all) noexcept;

/// What a stream kernel is made of.
struct StreamCase {
  std::string recursion = "dgc";
  std::string keys = "";     ///< of the recursion, as a config has them
  std::string variant = {};  ///< appended to the name
  double density = 0.01;
  TopKOptions topk = {};
  DType grad = DType::fp32;
  std::vector<std::size_t> layers = {};  ///< elements per segment; empty: one segment of all elements
  Isa isa = Isa::scalar;

  std::string name() const { return recursion + "_topk_" + (topk.exact ? "exact" : "sampled") + (variant.empty() ? "" : "_" + variant); }
};

/// Codec::stream: the fused pass that ships. Bytes: gradient and state, read and written once, and the entries that were kept.
class StreamKernel final : public Kernel {
 public:
  StreamKernel(StreamCase what, Arrays& arrays);
  std::string name() const override { return case_.name(); }
  const char* isa() const override { return to_string(case_.isa); }
  std::size_t numel() const override { return numel_; }
  std::optional<double> claimed() const override { return case_.density; }
  std::optional<double> density() const override;
  double bytes_per_element() const override;
  void settle() override;
  void run(std::size_t repetition) override { stream(repetition, repetition); }

  /// One step: the gradient of this repetition's window, under this number in the payload's header.
  void stream(std::size_t window, std::uint64_t step);
  ConstBytes payload() const noexcept { return wire_.bytes().sub(0, layout_.part_capacity); }
  const Codec& codec() const noexcept { return *codec_; }
  Plan plan() const noexcept { return plan_; }
  const Recursion& recursion() const noexcept { return recursion_; }
  StateView state() const noexcept { return {state_, nullptr}; }
  double entry_bytes() const noexcept { return entry_bytes_; }

 private:
  StreamCase case_;
  Arrays& arrays_;
  Recursion recursion_;
  std::unique_ptr<const Codec> codec_;
  std::vector<Segment> segments_;
  std::uint32_t part_end_ = 0;
  Plan plan_;
  std::vector<SegmentState> state_;
  std::vector<float> memory_;
  std::vector<std::uint32_t> kept_;
  std::size_t numel_ = 0;
  WireLayout layout_;
  Buffer wire_, workspace_;
  double entry_bytes_ = 0;
};

/// Codec::decode of several ranks' payloads into one dense mean. Bytes: the output once, and all entries.
class DecodeKernel final : public Kernel {
 public:
  DecodeKernel(double density, DType wire, int payloads, Isa isa, Arrays& arrays);
  std::string name() const override;
  const char* isa() const override { return to_string(isa_); }
  std::size_t numel() const override { return arrays_.numel(); }
  std::optional<double> claimed() const override { return density_; }
  std::optional<double> density() const override { return reached_; }
  double bytes_per_element() const override;
  void settle() override;
  void run(std::size_t repetition) override;

 private:
  double density_;
  DType wire_dtype_;
  int payloads_;
  Isa isa_;
  Arrays& arrays_;
  std::unique_ptr<StreamKernel> sender_;
  std::vector<Buffer> storage_;
  std::vector<ConstBytes> wires_;
  Buffer workspace_;
  double reached_ = 0, entry_bytes_ = 0;
};

/// The pieces that need no codec: norms for clipping, the message of a dense step, a look at error feedback (the two passes that a step
/// has more at which it is looked at: every 64th, every 4th where EControl's eta may be unstable). Their loops are compiled per ISA and
/// chosen by the loader.
class DenseKernel final : public Kernel {
 public:
  enum class What { norms, message, look };
  /// As names have it: "none_norms", "dgc_dense", "ef14_look".
  static std::string name_of(What what, const std::string& recursion);
  DenseKernel(What what, const std::string& recursion, Arrays& arrays);
  std::string name() const override;
  std::size_t numel() const override { return arrays_.numel(); }
  double bytes_per_element() const override;
  void settle() override;
  void run(std::size_t repetition) override;

 private:
  What what_;
  std::string recursion_name_;
  Recursion recursion_;
  Arrays& arrays_;
  Segment segment_;
  std::uint32_t part_end_ = 1;
  Plan plan_;
  SegmentState state_;
};

/// One group is measured together. Kernels are made when the group's turn comes and freed after it.
struct Group {
  std::vector<std::string> names;  ///< equal to the kernels', with /density appended: what filters match
  std::function<std::vector<std::unique_ptr<Kernel>>(Arrays&)> make;
  std::string pair;  ///< what the last kernel's time is compared with the first's for; empty: nothing
};

/// Every kernel at every density on `isa`. `numel`: of the flat arrays.
std::vector<Group> all_groups(Isa isa, std::size_t numel);

/// Elements of the 161 parameters of ResNet-50 (ImageNet), in model order: 25,557,032 in all.
const std::vector<std::size_t>& resnet50_layers();

}  // namespace thinwire::bench
