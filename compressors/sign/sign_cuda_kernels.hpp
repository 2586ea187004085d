#pragma once
// The launches of the sign codec on a GPU, seen from the host: what a plan's table holds, and one struct per call. Plain C++; the .cu files
// implement it.

#include <cstddef>
#include <cstdint>

#include "compressors/core/block_sum.hpp"
#include "compressors/core/device_recursion.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/stream.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/feedback/form.hpp"
#include "compressors/sign/sign_wire.hpp"

namespace thinwire::sign {

using feedback::Form;

/// A segment as kernels see it. Encoding goes by tiles of at most kSumBlock elements: whole blocks of a scale where they fit, else the
/// pieces of a wide one, which are summed apart. Everything else goes by chunks (DeviceRange).
struct DeviceSegment : DeviceStates {
  std::uint64_t scales_at = 0, bits_at = 0;  ///< bytes from the start of the wire: of part 0's payload
  const std::uint8_t* live = nullptr;
  std::uint64_t block = 1;       ///< elements per scale, at most the segment's
  std::uint32_t tile = 0;        ///< elements of a tile
  std::uint32_t pieces = 1;      ///< tiles of a wide block
  std::uint32_t first_tile = 0;  ///< among the plan's
  std::uint32_t first_wide = 0;  ///< its first wide block among the plan's
  std::uint32_t part = 0;
  float eta = 0;

  THINWIRE_HD bool wide() const noexcept { return block > kSumBlock; }
};

/// A part's payload as kernels see it.
struct DevicePart {
  std::uint64_t fingerprint = 0, bytes = 0;  ///< without the padding to the largest part's
  std::uint64_t scales = 0;
  std::uint32_t segments = 0;
};

/// How much work a plan is.
struct DeviceShape {
  std::size_t segments = 0, parts = 0, chunks = 0, tiles = 0, wides = 0, scales = 0;
  std::size_t capacity = 0;  ///< bytes of a part's payload
};

/// The table in device memory: segments, parts, then for each chunk, tile and wide block the segment it belongs to.
struct DeviceTable {
  const DeviceSegment* segments = nullptr;
  const DevicePart* parts = nullptr;
  const std::uint32_t *chunk_segment = nullptr, *tile_segment = nullptr, *wide_segment = nullptr;
};

/// Scratch of the encoding kernels.
struct DeviceScratch {
  double* block_sums = nullptr;        ///< per chunk, of the norms
  double* tile_sums = nullptr;         ///< per tile, if there are wide blocks
  std::uint32_t* tile_live = nullptr;  ///< the same: its live elements
};

struct EncodeCall {
  DeviceTable table;
  DeviceShape shape;
  DeviceScratch scratch;
  const std::byte* grad = nullptr;
  const float* grad_factor = nullptr;  ///< per segment, or null: 1
  const float* beta1 = nullptr;        ///< per segment; averaged forms
  std::byte* wire = nullptr;           ///< 4-byte aligned; all parts, one after the other
  std::uint32_t* flags = nullptr;      ///< may be null
  std::uint32_t* kept = nullptr;       ///< per segment; may be null
  wire::Header header;                 ///< but for what differs from part to part, and for the flags
  Output output;
  const float* output_factor = nullptr;  ///< where its factor is, if it is in device memory
  float rate = 0;
  float keep = 0, fresh = 1;  ///< smoothed forms: the shares of the average and of the gradient
  bool narrow = false;        ///< Recursion::narrow
  DType dtype = DType::fp32;
  SignOptions::Scale scale = SignOptions::Scale::l1;
};

/// See sign_cuda.hpp. @throws Error{device}.
void launch_encode(const EncodeCall& call, Form form, Stream stream);
/// One kernel: payloads that say nothing, with the header's flags. @throws Error{device}.
void launch_empty(const EncodeCall& call, Stream stream);

/// The codec's own faults beside the header's (core/wire.hpp).
enum class Fault : std::uint8_t { header, scale };

struct DecodeCall {
  DeviceTable table;
  DeviceShape shape;
  const std::byte* wire = nullptr;  ///< of rank 0
  std::size_t stride = 0;           ///< bytes to the next rank's
  std::uint32_t world = 1;          ///< payloads of each part
  bool apart = false;               ///< several parts: payload r is of part r alone
  wire::Header header;              ///< what a sound one is, but for the flags and what differs from part to part
  DeviceFactor factor = 1.0f;
  bool estimates = false;             ///< the mean is added to mean estimates, and output_factor × those is written
  DeviceFactor output_factor = 1.0f;  ///< estimates
  std::byte* out = nullptr;
  DType dtype = DType::fp32;
  std::uint32_t* flags = nullptr;
  DeviceReport* report = nullptr;
};

/// Two kernels: one checks the payloads, one writes the output. @throws Error{device}.
void launch_decode(const DecodeCall& call, Stream stream);
/// One kernel over this rank's own payloads, of all parts: residual += decode(payload) − beta1·m where `beta1` is given, unless `verdict`
/// is given and good. @throws Error{device}.
void launch_take_back(const DecodeCall& call, const float* beta1, const std::uint32_t* verdict, Stream stream);

}  // namespace thinwire::sign
