// The twin of nccl.cpp and nccl_api.cpp in a build without NCCL. make_nccl() itself needs nccl.h to be named, so nobody can call it here.

#include "collectives/nccl/version.hpp"

namespace thinwire {

bool built_with_nccl() noexcept { return false; }
std::string nccl_compiled() { return {}; }
std::string nccl_library() { return {}; }

}  // namespace thinwire
