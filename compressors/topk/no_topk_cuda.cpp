// The twin of topk_cuda.cpp in a build without CUDA.

#include "compressors/core/error.hpp"
#include "compressors/topk/topk_cuda.hpp"

namespace thinwire {

std::unique_ptr<const Codec> make_topk_cuda(const TopKOptions&) { fail(Errc::unsupported, "this build of thinwire has no CUDA"); }

}  // namespace thinwire
