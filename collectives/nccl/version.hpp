#pragma once
// What this build and this process know of NCCL. Needs no nccl.h.

#include <string>

namespace thinwire {

bool built_with_nccl() noexcept;
/// Of the nccl.h compiled against, "2.28.9"; empty: built without.
std::string nccl_compiled();
/// Of the libnccl.so.2 that this process has or would load; empty: there is none.
std::string nccl_library();

}  // namespace thinwire
