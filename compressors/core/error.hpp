#pragma once
// One exception type with a code: the code is API, the text is for people and says what was wrong, with which value, and what is allowed.

#include <stdexcept>
#include <string>

namespace thinwire {

enum class Errc {
  invalid_config,    ///< a configuration was refused; nothing changed
  invalid_argument,  ///< a call was refused; nothing changed
  corrupt_payload,   ///< bytes from a peer do not decode; the reducer refuses further steps
  peer_lost,         ///< a peer died or aborted; build a new communicator and reducer
  timeout,           ///< a peer did not answer within the deadline; as peer_lost
  transport,         ///< the transport (MPI, NCCL, c10d) failed for another reason; as peer_lost
  device,            ///< a CUDA call failed
  unsupported,       ///< this build or machine lacks what was asked for
  internal,          ///< a bug in thinwire
};

/// The code's name as users see it: "invalid_config", "timeout", …
const char* to_string(Errc code) noexcept;

/// peer_lost, timeout, transport: what a rank meets, too, whose peers are elsewhere in the program.
constexpr bool is_of_transport(Errc code) noexcept { return code == Errc::peer_lost || code == Errc::timeout || code == Errc::transport; }

class Error : public std::runtime_error {
 public:
  Error(Errc code, const std::string& what) : std::runtime_error(what), code_(code) {}
  Errc code() const noexcept { return code_; }

 private:
  Errc code_;
};

[[noreturn]] void fail(Errc code, const std::string& what);

namespace detail {
[[noreturn]] void fail_expects(const char* condition, const std::string& what, const char* file, int line);
}  // namespace detail

}  // namespace thinwire

/// Throws Error{invalid_argument}; `what_` is evaluated only on failure. One expression, safe in if/else.
#define THINWIRE_EXPECTS(cond_, what_) ((cond_) ? void(0) : ::thinwire::detail::fail_expects(#cond_, (what_), __FILE__, __LINE__))
