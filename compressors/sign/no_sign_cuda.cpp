// The twin of sign_cuda.cpp in a build without CUDA.

#include "compressors/core/error.hpp"
#include "compressors/sign/sign_cuda.hpp"

namespace thinwire {

std::unique_ptr<const Codec> make_sign_cuda(const SignOptions&) { fail(Errc::unsupported, "this build of thinwire has no CUDA"); }

}  // namespace thinwire
