#include "torch_ext/src/gloo_sockets.hpp"

#include <dirent.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace thinwire::torch_ext {
namespace {

int port_of(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
  if (address.ss_family == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
  return 0;
}

int local_port(int descriptor) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  return getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size) == 0 ? port_of(address) : 0;
}

int remote_port(int descriptor) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  return getpeername(descriptor, reinterpret_cast<sockaddr*>(&address), &size) == 0 ? port_of(address) : 0;
}

bool listens(int descriptor) {
  int value = 0;
  socklen_t size = sizeof value;
  return getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &value, &size) == 0 && value != 0;
}

}  // namespace

std::vector<GlooSockets::Socket> GlooSockets::open_sockets() {
  std::vector<Socket> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(opendir("/proc/self/fd"), closedir);
  if (!folder) return found;
  while (const dirent* entry = readdir(folder.get())) {
    char* end = nullptr;
    const long descriptor = std::strtol(entry->d_name, &end, 10);
    struct stat status {};
    if (end == entry->d_name || *end != 0 || fstat(int(descriptor), &status) != 0 || !S_ISSOCK(status.st_mode)) continue;
    found.push_back({int(descriptor), status.st_ino});
  }
  return found;
}

void GlooSockets::begin() { before_ = open_sockets(); }

int GlooSockets::listener() const {
  int port = 0;
  for (const Socket& socket : open_sockets()) {
    const bool old = std::any_of(before_.begin(), before_.end(), [&](const Socket& b) { return b.inode == socket.inode; });
    if (old || !listens(socket.descriptor)) continue;
    if (port != 0) return 0;
    port = local_port(socket.descriptor);
  }
  return port;
}

void GlooSockets::end(const std::vector<int>& ports) {
  const auto known = [&](int port) { return port != 0 && std::find(ports.begin(), ports.end(), port) != ports.end(); };
  mine_.clear();
  for (const Socket& socket : open_sockets()) {
    const bool old = std::any_of(before_.begin(), before_.end(), [&](const Socket& b) { return b.inode == socket.inode; });
    if (!old && !listens(socket.descriptor) && (known(local_port(socket.descriptor)) || known(remote_port(socket.descriptor)))) {
      mine_.push_back(socket);
    }
  }
  before_.clear();
}

void GlooSockets::shut() const noexcept {
  for (const Socket& socket : mine_) {
    struct stat status {};
    if (fstat(socket.descriptor, &status) == 0 && S_ISSOCK(status.st_mode) && status.st_ino == socket.inode)
      ::shutdown(socket.descriptor, SHUT_RDWR);
  }
}

}  // namespace thinwire::torch_ext
