// libFuzzer target: any bytes handed to the sign codec's decoder give a result or Error{corrupt_payload}, never a fault.
//   clang++-14 -std=c++20 -g -O1 -ffp-contract=off -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_sign_decode.cpp
//   compressors/sign/*.cpp \
//     compressors/core/{codec_checks,error,isa,wire}.cpp compressors/feedback/*.cpp -o fuzz_sign_decode && ./fuzz_sign_decode
//     -max_total_time=60
// The first byte chooses block, scale and whether the header is the fuzzer's own too, the second the ISA and how many ranks send the same;
// the rest overwrites a sound payload of zeros.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/sign/sign.hpp"

namespace {

using namespace thinwire;

constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};
constexpr std::size_t kBlocks[] = {8, 24, 512, 1024, 4096, 8192, 0, 5000};

Bytes bytes(std::vector<std::byte>& v) { return {v.data(), v.size(), DType::u8, Place::host, 0}; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const unsigned choice = data[0];
  SignOptions options;
  options.block = kBlocks[choice % 8];
  options.scale = (choice & 8) != 0 ? SignOptions::Scale::l2 : SignOptions::Scale::l1;
  const Isa isa = kIsas[data[1] % 3];
  if (!cpu_supports(isa)) return 0;
  const std::unique_ptr<const Codec> codec = make_sign(options, isa);

  Segment segments[3];
  const std::size_t counts[] = {37, 9000, 1};
  std::vector<std::uint8_t> live(counts[1] / 8 + 1, 0xa7);
  std::size_t numel = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    segments[s].parameter = std::uint32_t(s);
    segments[s].first = numel;
    segments[s].count = counts[s];
    numel += counts[s];
  }
  if ((choice & 16) != 0) segments[1].live = live.data();
  const std::uint32_t part_end = 3;
  const Plan plan{segments, {&part_end, 1}, 5};
  const WireLayout layout = codec->layout(plan);

  std::vector<std::byte> payload(layout.part_capacity);
  codec->empty(plan, bytes(payload), 0, Stream::host());
  const std::size_t start = (choice & 0x80) != 0 ? 0 : sizeof(wire::Header);
  std::memcpy(payload.data() + start, data + 2, std::min(size - 2, payload.size() - start));
  if ((choice & 0xc0) == 0xc0) payload.resize(std::min(payload.size(), size - 2));

  const std::vector<ConstBytes> wires(1 + data[1] / 3 % 5, bytes(payload));
  std::vector<std::byte> workspace(std::max(layout.workspace, layout.per_payload * wires.size()));
  std::vector<float> out(numel);
  std::uint32_t flags = 0;
  try {
    codec->decode(plan, wires, 1.0f / float(wires.size()), bytes(workspace), host_bytes(out.data(), out.size()), &flags, Stream::host());
    for (const float x : out) {
      if (std::isnan(x)) std::abort();  // scales are finite, and all ranks send the same sign
      if (std::isinf(x) && (flags & kFlagNonfinite) == 0) std::abort();
    }
    Recursion recursion;
    recursion.kind = Recursion::Kind::error_feedback;
    SegmentState states[3];
    for (std::size_t s = 0; s < 3; ++s) states[s].array = {out.data() + segments[s].first, nullptr};
    codec->take_back(recursion, plan, wires[0], {states, nullptr, nullptr}, nullptr, Stream::host());
  } catch (const Error& error) {
    if (error.code() != Errc::corrupt_payload) std::abort();
  }
  return 0;
}
