// libFuzzer target: any bytes handed to top-k's decoder give a result or Error{corrupt_payload}, never a fault.
//   clang++-14 -std=c++20 -g -O1 -ffp-contract=off -fsanitize=fuzzer,address,undefined -I. tests/fuzz/fuzz_topk_decode.cpp
//   compressors/topk/*.cpp \
//     compressors/core/{error,isa,wire}.cpp -o fuzz_topk_decode && ./fuzz_topk_decode -max_total_time=60
// The first byte chooses wire, index form, selection and whether the header is the fuzzer's own too; the rest overwrites a sound payload
// without entries.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/topk/topk.hpp"

namespace {

using namespace thinwire;

constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};

void decode(const Codec& codec, const Plan& plan, const std::vector<std::byte>& payload, std::vector<std::byte>& workspace,
            std::vector<float>& out) {
  const ConstBytes wires[] = {{payload.data(), payload.size(), DType::u8, Place::host, 0},
                              {payload.data(), payload.size(), DType::u8, Place::host, 0}};
  std::uint32_t flags = 0;
  codec.decode(plan, wires, 0.5f, {workspace.data(), workspace.size(), DType::u8, Place::host, 0}, host_bytes(out.data(), out.size()),
               &flags, Stream::host());
  Recursion recursion;
  recursion.kind = Recursion::Kind::error_feedback;
  std::vector<SegmentState> states(plan.segments.size());
  for (std::size_t s = 0; s < states.size(); ++s) states[s].array = {out.data() + plan.segments[s].first, nullptr};
  codec.take_back(recursion, plan, wires[0], {states, nullptr}, nullptr, Stream::host());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const unsigned choice = data[0];
  TopKOptions options;
  options.wire = DType(choice % 3);
  options.index = TopKOptions::Index(choice / 3 % 4);
  options.exact = (choice & 0x40) != 0;
  const Isa isa = kIsas[choice / 12 % 3];
  if (!cpu_supports(isa)) return 0;
  const std::unique_ptr<const Codec> codec = make_topk(options, isa);

  Segment segments[3];
  const std::size_t counts[] = {37, 70000, 1};
  std::size_t numel = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    segments[s].parameter = std::uint32_t(s);
    segments[s].first = numel;
    segments[s].count = counts[s];
    segments[s].setting.density = s == 1 ? 0.0005 : 0.2;
    numel += counts[s];
  }
  const std::uint32_t part_end = 3;
  const Plan plan{segments, {&part_end, 1}, 5};
  const WireLayout layout = codec->layout(plan);

  std::vector<std::byte> payload(layout.part_capacity), workspace(layout.workspace);
  codec->empty(plan, {payload.data(), payload.size(), DType::u8, Place::host, 0}, 0, Stream::host());
  const std::size_t start = (choice & 0x80) != 0 ? 0 : sizeof(wire::Header);
  std::memcpy(payload.data() + start, data + 1, std::min(size - 1, payload.size() - start));
  if ((choice & 0xc0) == 0xc0) payload.resize(std::min(payload.size(), size - 1));

  std::vector<float> out(numel);
  try {
    decode(*codec, plan, payload, workspace, out);
    for (const float x : out) {
      if (std::isnan(x)) std::abort();  // payloads hold finite values only, and two of one sign give no NaN
    }
  } catch (const Error& error) {
    if (error.code() != Errc::corrupt_payload) std::abort();
  }
  return 0;
}
