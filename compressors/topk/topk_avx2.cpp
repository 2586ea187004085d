#include "compressors/topk/topk_kernels.hpp"
namespace thinwire::topk {
const Kernels& kernels_avx2() noexcept { return kernels_scalar(); }
}  // namespace thinwire::topk
