// The AVX2 twin. The target is set by pragma for what follows it, not by a file flag: inline functions of the headers above must stay
// portable code.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "compressors/core/recursion.hpp"
#include "compressors/topk/topk_kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt")
#endif

#include "compressors/core/vector_avx2.hpp"
#include "compressors/topk/topk_vector.hpp"

namespace thinwire::topk {
namespace {

struct Avx2 : simd::Avx2 {
  static constexpr int kSlots = 3;  // of a group of 32
};

constexpr Kernels kAvx2 = make_kernels<Avx2>(
    {{{0.002f, 0.003f, 0.005f, 0.005f, 0.005f, 0.005f, 0.005f, 0.005f}, {0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f}}});

}  // namespace

const Kernels& kernels_avx2() noexcept { return kAvx2; }

}  // namespace thinwire::topk

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace thinwire::topk {
const Kernels& kernels_avx2() noexcept { return kernels_scalar(); }  // never asked for: cpu_supports says no
}  // namespace thinwire::topk

#endif
