#pragma once
// What kernels that decode share: they leave what is unsound in the verdict and in Plan::report. Only .cu files include it.

#include <cstddef>
#include <cstdint>

#include "compressors/core/cuda_device.cuh"
#include "compressors/core/plan.hpp"
#include "compressors/core/recursion.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire::cuda {

/// A payload is unsound: the verdict is bad, and the first one to say so fills the report (see wire::pack_fault).
__device__ inline void report_corrupt(std::uint32_t* flags, DeviceReport* report, unsigned fault, std::uint32_t rank, std::uint32_t place,
                                      std::uint64_t given, std::uint64_t wanted) {
  if (flags != nullptr) atomicOr(flags, std::uint32_t(kFlagNonfinite));  // nobody uses what comes out of it
  if (report == nullptr) return;
  if (atomicCAS_system(reinterpret_cast<unsigned long long*>(&report->claimed), 0ull, 1ull) != 0) return;
  report->given = given;
  report->wanted = wanted;
  __threadfence_system();
  *static_cast<volatile std::uint64_t*>(&report->corrupt) = wire::pack_fault(fault, rank, place);
}

/// The header of one payload, one thread per word; its flags join the verdict. `sound` is what it must be, but for the flags.
__device__ inline void check_header(const std::uint32_t* words, const wire::Header& sound, std::uint32_t rank, std::uint32_t* flags,
                                    DeviceReport* report) {
  constexpr unsigned kFlags = offsetof(wire::Header, flags) / 4, kLong = offsetof(wire::Header, bytes) / 4,
                     kReserved = offsetof(wire::Header, reserved) / 4;
  const auto* const expected = reinterpret_cast<const std::uint32_t*>(&sound);
  const unsigned i = threadIdx.x;
  if (i >= kReserved) return;
  const auto field = [&](const std::uint32_t* of) { return i < kLong ? of[i] : of[i / 2 * 2] | std::uint64_t(of[i / 2 * 2 + 1]) << 32; };
  if (i == kFlags) {
    constexpr std::uint32_t kKnown = kFlagNonfinite | kFlagJoined;
    if ((words[i] & ~kKnown) != 0) {
      report_corrupt(flags, report, wire::kHeaderFault, rank, i, words[i], kKnown);
    } else if (words[i] != 0 && flags != nullptr) {
      atomicOr(flags, words[i]);
    }
  } else if (words[i] != expected[i]) {
    report_corrupt(flags, report, wire::kHeaderFault, rank, i, field(words), field(expected));
  }
}

}  // namespace thinwire::cuda
