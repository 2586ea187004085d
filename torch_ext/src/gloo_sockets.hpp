#pragma once
// Gloo has no abort: an operation in flight ends only with its timeout. Shutting the group's TCP sockets ends it at once, here and on the
// peers, and needs no more than to know which sockets are the group's.

#include <sys/types.h>

#include <vector>

namespace thinwire::torch_ext {

/// The TCP sockets that were opened between begin() and end(). Another thread that opens sockets in between would be mistaken for the
/// group, so sockets count only if they belong to a listener born in between or lead to one of the peers' listeners.
class GlooSockets {
 public:
  /// Notes what is open. Linux only (/proc/self/fd); elsewhere nothing is found and timeouts alone end an operation.
  void begin();
  /// The port on which this process began to listen since begin(); 0 if none or several.
  int listener() const;
  /// Keeps the new sockets that are connected from or to `ports`.
  void end(const std::vector<int>& ports);
  /// Ends all traffic on them. Descriptors that were closed, or that now belong to something else, are left alone. Never throws.
  void shut() const noexcept;

 private:
  struct Socket {
    int descriptor;
    ino_t inode;
  };
  static std::vector<Socket> open_sockets();
  std::vector<Socket> before_, mine_;
};

}  // namespace thinwire::torch_ext
