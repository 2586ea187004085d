// Which kernels are measured, at which densities, and which of them beside each other.

#include <cstdio>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_sign.hpp"

namespace thinwire::bench {
namespace {

using Kernels = std::vector<std::unique_ptr<Kernel>>;

std::string with_density(const std::string& name, double density) {
  char text[96];
  std::snprintf(text, sizeof text, "%s/%g", name.c_str(), density);
  return text;
}

Group stream_group(const StreamCase& what) {
  return {{with_density(what.name(), what.density)},
          [what](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<StreamKernel>(what, arrays));
            return kernels;
          },
          {}};
}

Group decode_group(double density, DType wire, Isa isa) {
  const std::string name = wire == DType::fp32 ? "decode_topk_8" : std::string("decode_topk_8_") + to_string(wire) + "wire";
  return {{with_density(name, density)},
          [=](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<DecodeKernel>(density, wire, 8, isa, arrays));
            return kernels;
          },
          {}};
}

Group sign_group(const SignCase& what) {
  return {{what.name()},
          [what](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<SignKernel>(what, arrays));
            return kernels;
          },
          {}};
}

Group sign_decode_group(int payloads, Isa isa) {
  return {{"decode_sign_" + std::to_string(payloads)},
          [=](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<SignDecodeKernel>(payloads, isa, arrays));
            return kernels;
          },
          {}};
}

Group dense_group(DenseKernel::What what, const std::string& recursion) {
  return {{DenseKernel::name_of(what, recursion)},
          [=](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<DenseKernel>(what, recursion, arrays));
            return kernels;
          },
          {}};
}

/// The same elements as one segment and as 161, on the same arrays in turn: what the segment table costs.
Group resnet50_group(StreamCase what) {
  StreamCase layers = what, flat = what;
  layers.variant = "resnet50";
  layers.layers = resnet50_layers();
  flat.variant = "resnet50_flat";
  std::size_t total = 0;
  for (const std::size_t count : layers.layers) total += count;
  flat.layers = {total};
  return {{with_density(what.recursion + "_topk_sampled_resnet50", what.density)},
          [=](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<StreamKernel>(flat, arrays));
            kernels.push_back(std::make_unique<StreamKernel>(layers, arrays));
            return kernels;
          },
          "161 ResNet-50 layers against one flat array, time"};
}

/// A kernel that owns the arrays it is to be measured on.
class SpacedKernel final : public Kernel {
 public:
  SpacedKernel(const StreamCase& what, std::size_t numel) : arrays_(numel, Placement::spaced), inner_(what, arrays_) {
    std::printf("badly spaced: %s\n", arrays_.offsets().c_str());
  }
  std::string name() const override { return inner_.name(); }
  const char* isa() const override { return inner_.isa(); }
  std::size_t numel() const override { return inner_.numel(); }
  std::optional<double> claimed() const override { return inner_.claimed(); }
  std::optional<double> density() const override { return inner_.density(); }
  double bytes_per_element() const override { return inner_.bytes_per_element(); }
  void settle() override { inner_.settle(); }
  void run(std::size_t repetition) override { inner_.run(repetition); }

 private:
  Arrays arrays_;
  StreamKernel inner_;
};

Group spaced_group(const StreamCase& what) {
  StreamCase bad = what, good = what;
  bad.variant = "spaced128m";
  good.variant = "staggered";
  return {{with_density(what.recursion + "_topk_sampled_spaced128m", what.density)},
          [=](Arrays& arrays) {
            Kernels kernels;
            kernels.push_back(std::make_unique<StreamKernel>(good, arrays));
            kernels.push_back(std::make_unique<SpacedKernel>(bad, arrays.numel()));
            return kernels;
          },
          "arrays 128 MiB apart against the arena, time"};
}

}  // namespace

std::vector<Group> all_groups(Isa isa, std::size_t numel) {
  std::vector<Group> groups;
  const auto make = [isa](const char* recursion, double density) {
    StreamCase what;
    what.recursion = recursion;
    what.density = density;
    what.isa = isa;
    return what;
  };
  constexpr double kDensities[] = {0.001, 0.01, 0.08};
  for (const char* recursion : {"dgc", "ef14", "ef21", "econtrol", "none"}) {
    for (const double density : kDensities) groups.push_back(stream_group(make(recursion, density)));
  }
  groups.push_back(stream_group(make("econtrol", 0.005)));
  for (const char* recursion : {"dgc", "ef14", "none"}) {
    for (const double density : kDensities) {
      StreamCase what = make(recursion, density);
      what.topk.exact = true;
      groups.push_back(stream_group(what));
    }
  }
  for (const char* recursion : {"dgc", "ef14"}) {
    StreamCase grad = make(recursion, 0.01), wire = grad;
    grad.grad = DType::bf16;
    grad.variant = "bf16grad";
    groups.push_back(stream_group(grad));
    wire.topk.wire = DType::bf16;
    wire.variant = "bf16wire";
    groups.push_back(stream_group(wire));
  }
  for (const auto& [recursion, keys] : {std::pair("ef14", "residual=bf16"), {"econtrol", "residual=bf16,estimate=grid"}}) {
    StreamCase what = make(recursion, 0.01);
    what.keys = keys;
    what.variant = "narrow";
    groups.push_back(stream_group(what));
  }
  for (const double density : kDensities) groups.push_back(decode_group(density, DType::fp32, isa));
  groups.push_back(decode_group(0.01, DType::bf16, isa));
  for (const char* recursion : {"ef14", "averaged_ef14", "none"}) groups.push_back(sign_group({.recursion = recursion, .isa = isa}));
  groups.push_back(sign_group({.variant = "512", .options = {.block = 512}, .isa = isa}));
  groups.push_back(sign_group({.variant = "tensor", .options = {.block = 0}, .isa = isa}));
  groups.push_back(sign_group({.recursion = "econtrol", .variant = "512", .options = {.block = 512}, .isa = isa}));
  groups.push_back(sign_decode_group(8, isa));
  std::size_t resnet50 = 0;
  for (const std::size_t count : resnet50_layers()) resnet50 += count;
  if (numel >= resnet50) groups.push_back(resnet50_group(make("dgc", 0.01)));
  for (const char* recursion : {"dgc", "ef14"}) groups.push_back(spaced_group(make(recursion, 0.01)));
  groups.push_back(dense_group(DenseKernel::What::norms, "none"));
  for (const char* recursion : {"none", "dgc", "ef14"}) groups.push_back(dense_group(DenseKernel::What::message, recursion));
  for (const char* recursion : {"dgc", "ef14", "econtrol"}) groups.push_back(dense_group(DenseKernel::What::look, recursion));
  return groups;
}

const std::vector<std::size_t>& resnet50_layers() {
  static const std::vector<std::size_t> layers = [] {
    std::vector<std::size_t> sizes;
    const auto convolution = [&sizes](std::size_t in, std::size_t out, std::size_t kernel) {
      sizes.push_back(in * out * kernel * kernel);
      sizes.push_back(out);  // scale and shift of its batch norm
      sizes.push_back(out);
    };
    convolution(3, 64, 7);
    std::size_t in = 64;
    constexpr std::size_t kBlocks[] = {3, 4, 6, 3};
    for (std::size_t stage = 0; stage < 4; ++stage) {
      const std::size_t width = std::size_t(64) << stage, out = 4 * width;
      for (std::size_t block = 0; block < kBlocks[stage]; ++block) {
        convolution(in, width, 1);
        convolution(width, width, 3);
        convolution(width, out, 1);
        if (block == 0) convolution(in, out, 1);
        in = out;
      }
    }
    sizes.push_back(in * 1000);
    sizes.push_back(1000);
    return sizes;
  }();
  return layers;
}

}  // namespace thinwire::bench
