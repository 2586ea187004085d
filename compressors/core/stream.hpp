#pragma once
// Where work is ordered. On the host a call returns when its work is done; on a GPU it enqueues on the stream and returns.

#include <cstddef>

#include "compressors/core/span.hpp"

struct CUstream_st;  // cudaStream_t, named so that plain g++ compiles this header

namespace thinwire {

class Stream {
 public:
  static Stream host() noexcept { return Stream(Place::host, nullptr, 0); }
  static Stream cuda(CUstream_st* stream, int device) noexcept { return Stream(Place::cuda, stream, device); }
  static Stream cuda(std::nullptr_t, int) = delete;  // the legacy default stream orders itself against everything: never by accident

  Place place() const noexcept { return place_; }
  CUstream_st* get() const noexcept { return stream_; }
  int device() const noexcept { return device_; }

 private:
  Stream(Place place, CUstream_st* stream, int device) noexcept : place_(place), stream_(stream), device_(device) {}
  Place place_;
  CUstream_st* stream_;
  int device_;
};

}  // namespace thinwire
