// The fused step behind a C interface, for bench/eager.py: it runs beside torch's eager operations in one process, on arrays of one arena.

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>

#include "bench/kernels_cases.hpp"
#include "bench/kernels_sign.hpp"

namespace {

using namespace thinwire;
using namespace thinwire::bench;

/// `name`: a recursion, whose step is top-k's, or <recursion>_sign.
std::unique_ptr<Kernel> kernel_named(const std::string& name, double density, Isa isa, Arrays& arrays) {
  constexpr std::string_view kSign = "_sign";
  if (name.ends_with(kSign))
    return std::make_unique<SignKernel>(SignCase{.recursion = name.substr(0, name.size() - kSign.size()), .isa = isa}, arrays);
  StreamCase what;
  what.recursion = name;
  what.density = density;
  what.isa = isa;
  return std::make_unique<StreamKernel>(what, arrays);
}

struct Step {
  Step(std::size_t numel, const std::string& name, double density, Isa isa)
      : arrays(numel, Placement::arena),
        references(arrays),
        eager(std::array<std::size_t, 2>{numel, numel}),
        kernel(kernel_named(name, density, isa, arrays)) {
    kernel->settle();
  }
  Arrays arrays;
  References references;
  Arena eager;  ///< torch's own momentum and residual, placed as well as ours
  std::unique_ptr<Kernel> kernel;
};

}  // namespace

extern "C" {

/// The step called `name` on arrays of `numel` elements, settled at `density` where it has one; null after an error, which is printed.
__attribute__((visibility("default"))) void* thinwire_step_open(const char* name, std::size_t numel, double density, const char* isa) {
  try {
    pin_this_thread();
    return new Step(numel, name, density, std::strcmp(isa, "auto") == 0 ? active_isa() : parse_isa(isa));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return nullptr;
  }
}
__attribute__((visibility("default"))) void thinwire_step_close(void* step) { delete static_cast<Step*>(step); }
__attribute__((visibility("default"))) const char* thinwire_step_isa(void* step) { return static_cast<Step*>(step)->kernel->isa(); }

/// Seconds of one fused step, or a negative number after an error, which is printed.
__attribute__((visibility("default"))) double thinwire_step_run(void* step, std::size_t repetition) {
  try {
    return seconds_of([&] { static_cast<Step*>(step)->kernel->run(repetition); });
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return -1;
  }
}
__attribute__((visibility("default"))) double thinwire_step_copy(void* step) {
  return seconds_of([&] { static_cast<Step*>(step)->references.copy(); });
}
__attribute__((visibility("default"))) double thinwire_step_axpy(void* step) {
  return seconds_of([&] { static_cast<Step*>(step)->references.axpy(); });
}
__attribute__((visibility("default"))) double thinwire_step_density(void* step) {
  return static_cast<Step*>(step)->kernel->density().value_or(0);
}
__attribute__((visibility("default"))) double thinwire_step_bytes(void* step) {
  return static_cast<Step*>(step)->kernel->bytes_per_element();
}

/// 0 gradient of this repetition, 1 momentum, 2 residual of the fused step; 3 momentum, 4 residual for torch.
__attribute__((visibility("default"))) float* thinwire_step_array(void* step, int which, std::size_t repetition) {
  Step& s = *static_cast<Step*>(step);
  switch (which) {
    case 0:
      return const_cast<float*>(s.arrays.grad(repetition));
    case 1:
      return s.arrays.momentum();
    case 2:
      return s.arrays.residual();
    case 3:
      return s.eager.array(0);
    case 4:
      return s.eager.array(1);
    default:
      return nullptr;
  }
}
}
