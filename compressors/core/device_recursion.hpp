#pragma once
// The recursion's unfused pieces on a GPU, seen from the host: gradient norms, clip factors and the dense step. Plain C++;
// compressors/feedback/feedback_cuda.cu implements it. Every call enqueues on the stream and @throws Error{device} where a kernel cannot be
// launched.

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "compressors/core/dtype.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// Elements of one block's work, counted from the start of a segment: a block sum of the norms too.
inline constexpr std::uint32_t kDeviceChunk = 4096;

/// Where a segment lies.
struct DeviceRange {
  std::uint64_t first = 0, count = 0;  ///< elements of the flat buffer
  std::uint32_t first_chunk = 0;
};

/// A segment and its state, null where it has none; what kernels of any family know of it begins with this.
struct DeviceStates {
  DeviceRange range;
  float* momentum = nullptr;  ///< DGC's u, or the shared m
  StateArray residual, estimate;
  float *mean_estimate = nullptr, *average = nullptr;
  const float* eta_limit = nullptr;

  void set(const Recursion& recursion, const SegmentState& state) noexcept {
    if (recursion.kind == Recursion::Kind::momentum_correction || recursion.averaged) momentum = state.array[0].fp32();
    residual = residual_of(recursion, state);
    estimate = estimate_of(recursion, state);
    mean_estimate = mean_estimate_of(recursion, state);
    average = average_of(recursion, state);
    eta_limit = state.eta_limit;
  }
  /// Whether 16 bytes of any array can be loaded at once.
  bool aligned() const noexcept {
    for (const void* array : std::initializer_list<const void*>{momentum, residual.data(), estimate.data(), mean_estimate, average})
      if (reinterpret_cast<std::uintptr_t>(array) % 16 != 0) return false;
    return true;
  }
};

/// A table of structs that begin with DeviceStates, `stride` bytes apart, and for each chunk the segment it belongs to. Device memory.
struct DeviceRanges {
  const std::byte* base = nullptr;
  std::size_t stride = 0, segments = 0, chunks = 0;
  const std::uint32_t* chunk_segment = nullptr;
};

constexpr std::size_t device_chunks(std::size_t count) noexcept { return (count + kDeviceChunk - 1) / kDeviceChunk; }

/// A factor that the host knows, or that lies in device memory because a kernel made it.
struct DeviceFactor {
  float value = 1.0f;
  const float* at = nullptr;

  constexpr DeviceFactor(float known) noexcept : value(known) {}
  constexpr DeviceFactor(const float* where) noexcept : at(where) {}
  THINWIRE_HD float read() const noexcept { return at != nullptr ? *at : value; }
};

/// Messages of all ranks, packed alike, `stride` bytes apart.
struct RankMessages {
  const std::byte* first = nullptr;
  std::size_t stride = 0;
  int world = 1;
  DType dtype = DType::fp32;
};

/// norms[s] as squared_norms gives them, to the bit. Two kernels; `block_sums`: one double per chunk.
void launch_squared_norms(const DeviceRanges& ranges, ConstBytes grad, double* block_sums, double* norms, Stream stream);

/// factors[s] as clip_factors gives them. One kernel.
void launch_clip_factors(const Recursion& recursion, const DeviceRanges& ranges, const double* norms, DeviceFactor unscale, int world,
                         std::size_t total_numel, float* factors, Stream stream);

/// A segment that stays dense, or a part of one.
struct DeviceDense : DeviceStates {
  std::uint32_t factor = 0;            ///< which factor is its
  std::uint64_t packed = 0;            ///< its first element among the packed messages
  std::uint64_t message = 0;           ///< of a shared momentum: the same, `packed` being of the packed momenta
  StateArray held;                     ///< where its message lies until the verdict: the residual, or the estimate of EF21's first one
  const std::uint8_t* live = nullptr;  ///< Segment::live
  float eta = 0;                       ///< Setting::eta
  bool keeps_rest = false;             ///< a starting step leaves in the residual what the grid cuts off
  bool rounds = false;                 ///< the message becomes an estimate on bf16's grid, or lies in a narrow residual until then

  void set(const Recursion& recursion, const SegmentState& state) noexcept {
    DeviceStates::set(recursion, state);
    held = recursion.starting && !recursion.control ? estimate : residual;
    rounds = recursion.starting && (recursion.narrow || recursion.grid);
    keeps_rest = recursion.starting && recursion.grid;
  }
};

/// dense_message over segments with state, messages in fp32. One kernel: reads gradient and state, writes state and messages. `beta1`:
/// averaged forms, in the order of `factors`.
void launch_dense_message(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors, float* messages,
                          std::uint32_t* flags, Stream stream, const float* beta1 = nullptr);
/// dense_message over segments without: their elements as they are, in the gradient's dtype. One kernel.
void launch_copy_message(const DeviceRanges& ranges, ConstBytes grad, std::byte* messages, std::uint32_t* flags, Stream stream);
/// settle_dense where `verdict` is null or lacks kFlagNonfinite. One kernel.
void launch_settle_dense(const DeviceRanges& ranges, const std::uint32_t* verdict, Stream stream);

/// What probe_messages and probe_rest add up, chunk by chunk in `sums`, kProbeSums doubles each, which launch_watch (collectives) adds up
/// further. Over DeviceDense. One kernel each: reads gradient and state once.
inline constexpr std::size_t kProbeSums = 5;
void launch_probe_messages(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors,
                           const float* beta1, double* sums, Stream stream);
void launch_probe_rest(const Recursion& recursion, const DeviceRanges& ranges, ConstBytes grad, const float* factors, double* sums,
                       Stream stream);

// Recursion::Kind::estimate, each one kernel.

/// keep_news where `verdict` is null or has kFlagNonfinite. Nothing is launched for EF21.
void launch_keep_news(const Recursion& recursion, const DeviceRanges& ranges, const std::uint32_t* verdict, Stream stream);
/// start_estimates by `verdict`, over DeviceDense; the means are factor × sums[packed + i].
void launch_start_estimates(const DeviceRanges& ranges, const float* sums, float factor, const std::uint32_t* verdict, Stream stream);
/// out[packed + i] = h, 0 where there is none; and back: H = factor × sums[packed + i], cut at the largest float. Over DeviceDense.
void launch_pack_estimates(const DeviceRanges& ranges, float* out, Stream stream);
void launch_set_mean_estimates(const DeviceRanges& ranges, const float* sums, float factor, Stream stream);

// target=momentum, each one kernel over segments with a shared momentum m; beta1 in the order of `factors`.

/// out[packed + i] = what m becomes of a mean that was not compressed: factor × Σ_r message r, or grad·unscale where `messages` are not
/// here: itself where it is a momentum (`averaging`; dead elements and their gradients become 0), else average_momentum of it.
void launch_note_momentum(const DeviceRanges& ranges, const RankMessages& messages, float factor, Bytes grad, const float* unscale,
                          const float* beta1, bool averaging, float* out, Stream stream);
/// m = from[packed + i] where `verdict` lacks kFlagNonfinite.
void launch_move_momentum(const DeviceRanges& ranges, const float* from, const std::uint32_t* verdict, Stream stream);
/// residual −= beta1·m where `verdict` has it: the message is in the residual still, and the next one will hold that share again.
void launch_forget_momentum(const DeviceRanges& ranges, const float* beta1, const std::uint32_t* verdict, Stream stream);

}  // namespace thinwire
