#pragma once
// The sign codec: one bit per element and a scale per block of them. Table of contents: sign_math.hpp (scales and values, which decide
// bits), sign_wire.hpp (layout of a payload), sign_kernels.hpp (the kernels behind one table per ISA), sign_scalar.cpp and sign_vector.hpp
// (the twins), sign.cpp (the codec), sign_cuda.hpp (its twin on a GPU).

#include <cstddef>
#include <cstdint>
#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/core/isa.hpp"

namespace thinwire {

struct SignOptions {
  enum class Scale : std::uint8_t {
    l1,  ///< mean magnitude: a contraction, ‖x − C(x)‖² = ‖x‖² − ‖x‖₁²/n
    l2,  ///< root of the mean square, as DeepSpeed has it: no contraction where x is sparse
  };
  Scale scale = Scale::l1;
  std::size_t block = 1024;  ///< elements per scale, a multiple of 8; 0: one scale per segment
};

/// Of the scale l1: 2/pi = .64 for normal entries, .5 for Laplace's. The worst case, one entry alone, is 1/n.
inline constexpr double kSignDelta = 0.5;

/// C(x) = s·sgn(x) with sgn = +1 where !(x < 0), else −1. Combines by re-encoding. Per element 1 bit, per block 4 bytes, per payload a
/// header of 64 bytes; P parts of a plan give P payloads one after the other, each as large as the largest. stream reads gradient, momentum
/// (averaged) and residual once and writes the residual once for blocks of at most kSumBlock elements, twice for larger ones. Recursions:
/// none and error_feedback, averaged or not, and estimate. Bit-exact on every ISA and device.
/// @source 1-bit SGD (Seide et al. 2014), EF-signSGD (Karimireddy et al. 2019), 1-bit Adam (Tang et al. 2021).
/// @throws Error{invalid_argument} on a block that is no multiple of 8, or an ISA that this CPU lacks.
std::unique_ptr<const Codec> make_sign(const SignOptions& options, Isa isa = active_isa());

}  // namespace thinwire
