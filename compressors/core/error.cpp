#include "compressors/core/error.hpp"

namespace thinwire {

const char* to_string(Errc code) noexcept {
  switch (code) {
    case Errc::invalid_config:
      return "invalid_config";
    case Errc::invalid_argument:
      return "invalid_argument";
    case Errc::corrupt_payload:
      return "corrupt_payload";
    case Errc::peer_lost:
      return "peer_lost";
    case Errc::timeout:
      return "timeout";
    case Errc::transport:
      return "transport";
    case Errc::device:
      return "device";
    case Errc::unsupported:
      return "unsupported";
    case Errc::internal:
      return "internal";
  }
  return "unknown";
}

void fail(Errc code, const std::string& what) { throw Error(code, what); }

namespace detail {

void fail_expects(const char* condition, const std::string& what, const char* file, int line) {
  fail(Errc::invalid_argument, what + " (" + condition + ", " + file + ":" + std::to_string(line) + ")");
}

}  // namespace detail
}  // namespace thinwire
