#include "collectives/nccl/nccl_api.hpp"

#include <dlfcn.h>

#include <cstddef>

#include "collectives/nccl/version.hpp"
#include "compressors/core/error.hpp"

namespace thinwire {
namespace detail {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";
constexpr int kOldest = 21800;  // ncclCommSplit

/// By name, never by path: the library that the process has already, where it has one.
void* open_library() { return dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL); }

template <class Function>
bool find(void* library, const char* name, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, name));
  return out != nullptr;
}

NcclApi load() {
  void* const library = open_library();
  if (library == nullptr) {
    const char* why = dlerror();
    fail(Errc::unsupported, std::string("NCCL cannot be used: ") + (why != nullptr ? why : "there is no libnccl.so.2"));
  }
  NcclApi api;
  const char* missing = nullptr;
  const auto need = [&](const char* name, auto& out) {
    if (!find(library, name, out) && missing == nullptr) missing = name;
  };
  need("ncclGetVersion", api.get_version);
  need("ncclGetUniqueId", api.get_unique_id);
  need("ncclCommInitRankConfig", api.init_rank);
  need("ncclCommSplit", api.split);
  need("ncclCommDestroy", api.destroy);
  need("ncclCommAbort", api.abort);
  need("ncclCommGetAsyncError", api.async_error);
  need("ncclCommCount", api.count);
  need("ncclCommUserRank", api.user_rank);
  need("ncclGetErrorString", api.error_string);
  need("ncclGetLastError", api.last_error);
  need("ncclAllGather", api.all_gather);
  need("ncclAllReduce", api.all_reduce);
  need("ncclBroadcast", api.broadcast);
  need("ncclSend", api.send);
  need("ncclRecv", api.recv);
  need("ncclGroupStart", api.group_start);
  need("ncclGroupEnd", api.group_end);
  if (missing != nullptr) fail(Errc::unsupported, std::string("the process's libnccl.so.2 has no ") + missing);
  find(library, "ncclAlltoAll", api.all_to_all);
  api.get_version(&api.version);
  if (api.version < kOldest)
    fail(Errc::unsupported, "the process's NCCL is " + nccl_version_text(api.version) + ", thinwire needs 2.18 or newer");
  return api;
}

}  // namespace

const NcclApi& nccl_api() {
  static const NcclApi api = load();
  return api;
}

std::string nccl_version_text(int code) {
  return std::to_string(code / 10000) + "." + std::to_string(code / 100 % 100) + "." + std::to_string(code % 100);
}

}  // namespace detail

bool built_with_nccl() noexcept { return true; }
std::string nccl_compiled() { return detail::nccl_version_text(NCCL_VERSION_CODE); }
std::string nccl_library() {
  try {
    return detail::nccl_version_text(detail::nccl_api().version);
  } catch (const Error&) { return {}; }
}

}  // namespace thinwire
