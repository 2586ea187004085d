// The AVX-512 twin (F, BW, DQ, VL). The target is set by pragma for what follows it, not by a file flag: inline functions of the headers
// above must stay portable code.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "compressors/core/recursion.hpp"
#include "compressors/topk/topk_kernels.hpp"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,bmi,bmi2,popcnt")
#endif

#include "compressors/core/vector_avx512.hpp"
#include "compressors/topk/topk_vector.hpp"

namespace thinwire::topk {
namespace {

struct Avx512 : simd::Avx512 {
  static constexpr int kSlots = 4;  // of a group of 64
};

constexpr Kernels kAvx512 = make_kernels<Avx512>(
    {{{0.002f, 0.003f, 0.005f, 0.005f, 0.005f, 0.005f, 0.005f, 0.005f}, {0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f, 0.03f}}});

}  // namespace

const Kernels& kernels_avx512() noexcept { return kAvx512; }

}  // namespace thinwire::topk

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#else

namespace thinwire::topk {
const Kernels& kernels_avx512() noexcept { return kernels_scalar(); }  // never asked for: cpu_supports says no
}  // namespace thinwire::topk

#endif
