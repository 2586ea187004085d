#pragma once
// The launches of top-k on a GPU, seen from the host: what a plan's table holds, and one struct per call. Plain C++; the .cu files
// implement it.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "compressors/core/codec.hpp"
#include "compressors/core/device_recursion.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/stream.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/feedback/form.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::topk {

using feedback::Form;

inline constexpr std::uint32_t kSampleBlock = 1024;  // sampled elements of one block's work
inline constexpr std::uint32_t kDigitBins = 2048;
inline constexpr int kDigits = 3;  // 11, 11 and 9 bits of a magnitude
static_assert(kBlock % kDeviceChunk == 0);

/// A segment as kernels see it.
struct DeviceSegment : DeviceStates {
  std::uint64_t index_at = 0, value_at = 0;  ///< bytes from the payload's start
  float* memory = nullptr;
  float eta = 0;
  const std::uint8_t* live = nullptr;
  std::uint32_t k = 0, capacity = 0;
  std::uint32_t form = 0;                       ///< IndexForm
  std::uint32_t sampled = 0;                    ///< elements in the sample; 0: the threshold is the floor
  std::uint32_t high = 0, middle = 0, low = 0;  ///< SampleRanks; exact: middle is the candidate rank
  std::uint32_t to_high = 0, to_low = 0;
  std::uint32_t first_sample_block = 0, first_unit = 0;
  std::uint32_t candidates = 0;  ///< exact: how many are kept
  std::uint64_t first_candidate = 0;
};

/// How much work a plan is. Units are blocks of kBlock elements, as the payload counts them.
struct DeviceShape {
  std::size_t segments = 0, chunks = 0, sample_blocks = 0, units = 0, candidates = 0;
  std::size_t payload_bytes = 0;
};

/// The table in device memory: segments, then for each chunk, sample block and unit the segment it belongs to.
struct DeviceTable {
  const DeviceSegment* segments = nullptr;
  const std::uint32_t *chunk_segment = nullptr, *sample_segment = nullptr, *unit_segment = nullptr;
};

/// Scratch of the encoding kernels. What lies in [cleared, cleared + cleared_words) is zeroed by the first of them.
struct DeviceScratch {
  std::uint32_t *magnitudes = nullptr, *near = nullptr;                        ///< kSampleBlock per sample block
  std::uint32_t *near_count = nullptr, *above = nullptr, *at_least = nullptr;  ///< per sample block
  float *threshold = nullptr, *steepness = nullptr;                            ///< per segment
  double* block_sums = nullptr;                                                ///< per chunk, of the norms
  std::uint32_t* candidate_index = nullptr;                                    ///< exact
  float* candidate_value = nullptr;                                            ///< exact
  std::uint64_t *looked_back = nullptr, *cut_looked_back = nullptr;            ///< per chunk; exact has two passes
  std::uint32_t *tickets = nullptr, *hits = nullptr, *histogram = nullptr;     ///< 2; per segment; exact: kDigits · kDigitBins each
  std::uint32_t* cleared = nullptr;
  std::size_t cleared_words = 0;
};

struct EncodeCall {
  DeviceTable table;
  DeviceShape shape;
  DeviceScratch scratch;
  const std::byte* grad = nullptr;
  const float* grad_factor = nullptr;  ///< per segment, or null: 1
  std::byte* wire = nullptr;           ///< 4-byte aligned
  std::uint32_t* flags = nullptr;      ///< may be null
  std::uint32_t* kept = nullptr;       ///< per segment; may be null
  wire::Header header;                 ///< but for the flags
  std::uint64_t draw = 0;
  float rate = 0, floor = 0;
  float keep = 0, fresh = 1;  ///< smoothed forms: the shares of the average and of the gradient
  bool grid = false;          ///< Recursion::grid
  bool narrow = false;        ///< Recursion::narrow
  DType grad_dtype = DType::fp32, wire_dtype = DType::fp32;
  bool mask = true, exact = false;
};

/// sampled: 3 kernels; exact: 7, and one more where estimates have a residual or an average beside them or a
/// residual is narrow. @throws Error{device}.
void launch_encode(const EncodeCall& call, Form form, Stream stream);
/// Its first two: a sample, and the thresholds from it; what the pass counts in and the payload are zero after them.
void launch_thresholds(const EncodeCall& call, Form form, Stream stream);
/// The part of launch_encode that only exact selection has: from candidates to payload.
void launch_cut(const EncodeCall& call, Form form, Stream stream);

/// What DeviceReport::corrupt says of a payload (wire::pack_fault); the place is a segment.
enum class Fault : std::uint8_t { header, kept, order, range, blocks, bits, padding, finite };

struct DecodeCall {
  DeviceTable table;
  DeviceShape shape;
  const std::byte* wire = nullptr;  ///< of rank 0
  std::size_t stride = 0;           ///< bytes to the next rank's
  std::uint32_t world = 1;
  wire::Header header;  ///< what a sound one is, but for the flags
  DeviceFactor factor = 1.0f;
  bool estimates = false;             ///< the mean is added to mean estimates, and output_factor × those is written
  DeviceFactor output_factor = 1.0f;  ///< estimates
  std::byte* out = nullptr;
  DType out_dtype = DType::fp32, wire_dtype = DType::fp32;
  std::uint32_t* flags = nullptr;
  DeviceReport* report = nullptr;
  /// Scratch: per rank and chunk its first entry, and behind each segment's chunks how many it has; per rank and unit.
  std::uint32_t *chunk_start = nullptr, *unit_count = nullptr;

  /// Of segment s, whose first chunk is this one.
  THINWIRE_HD std::uint32_t* starts(std::uint32_t rank, std::uint32_t s, std::uint32_t first_chunk) const {
    return chunk_start + rank * (shape.chunks + shape.segments) + first_chunk + s;
  }
};

/// Two kernels: one checks the payloads and finds where each chunk's entries begin, one writes the output. @throws Error{device}.
void launch_decode(const DecodeCall& call, Stream stream);
/// One kernel: residual += decode(payload), unless `verdict` is given and good. @throws Error{device}.
void launch_take_back(const DecodeCall& call, const std::uint32_t* verdict, Stream stream);
/// One kernel: a payload without entries. @throws Error{device}.
void launch_empty(std::byte* wire, const wire::Header& header, Stream stream);

/// make_topk_cuda with another way to encode, for measurements.
std::unique_ptr<const Codec> make_topk_cuda_with(const TopKOptions& options, void (*encode)(const EncodeCall&, Form, Stream));

}  // namespace thinwire::topk
