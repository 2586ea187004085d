#pragma once
// A codec of device memory behind the interface of host memory: everything is copied there and back around each call, so that the tests of
// the host's codecs run on it as they are.

#include <memory>

#include "compressors/core/codec.hpp"

namespace thinwire {

/// `codec` works on device 0.
std::unique_ptr<const Codec> on_device(std::unique_ptr<const Codec> codec);

}  // namespace thinwire
