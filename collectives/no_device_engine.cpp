// The twin of device_engine.cpp in a build without CUDA.

#include "collectives/bucket_engine.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {

std::unique_ptr<BucketEngine> make_device_engine(const EngineParts&, int) {
  fail(Errc::unsupported, "this build of thinwire has no CUDA: it reduces host memory only");
}

}  // namespace thinwire
