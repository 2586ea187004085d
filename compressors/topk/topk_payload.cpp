#include "compressors/topk/topk_payload.hpp"

#include <string>

#include "compressors/core/error.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::topk {
namespace {

void check_bounds(const Plan& plan, std::size_t elements) {
  for (const Segment& segment : plan.segments) {
    THINWIRE_EXPECTS(segment.count <= elements && segment.first <= elements - segment.count,
                     "topk: parameter " + std::to_string(segment.parameter) + " has elements [" + std::to_string(segment.first) + ", " +
                         std::to_string(segment.first + segment.count) + ") of a flat buffer of " + std::to_string(elements));
  }
}

}  // namespace

wire::Header payload_header(const Plan& plan, const TopKOptions& options, std::size_t bytes, std::uint32_t flags) noexcept {
  wire::Header header;
  header.codec = wire::kCodecTopK;
  header.flags = flags;
  header.segments = std::uint32_t(plan.segments.size());
  header.bytes = bytes;
  header.plan = wire::plan_fingerprint(plan, options_salt(options));
  header.step = plan.step;
  return header;
}

void check_parts(const Plan& plan) {
  THINWIRE_EXPECTS(plan.part_end.size() <= 1,
                   "topk: payloads are gathered whole, the plan has " + std::to_string(plan.part_end.size()) + " parts");
}

void check_payload_size(std::size_t given, std::size_t bytes) {
  THINWIRE_EXPECTS(given == bytes, "topk: the payload has " + std::to_string(given) + " bytes, this plan's has " + std::to_string(bytes));
}

void check_workspace(std::size_t given, std::size_t bytes) {
  THINWIRE_EXPECTS(given >= bytes, "topk: the workspace has " + std::to_string(given) + " bytes, this plan needs " + std::to_string(bytes));
}

void check_input(const Plan& plan, ConstBytes grad) {
  THINWIRE_EXPECTS(grad.dtype != DType::u8, "topk: gradients are fp32, bf16 or fp16");
  check_bounds(plan, grad.count());
}

void check_message(int round, ConstBytes message) {
  THINWIRE_EXPECTS(round == 0, "topk has one round, round " + std::to_string(round) + " was asked for");
  THINWIRE_EXPECTS(message.dtype == DType::fp32, std::string("a message is fp32, this one is ") + to_string(message.dtype));
}

void check_output(const Plan& plan, ConstBytes out) {
  THINWIRE_EXPECTS(out.dtype != DType::u8, "topk: the output is fp32, bf16 or fp16");
  check_bounds(plan, out.count());
}

void check_state(const Plan& plan, const Recursion& recursion, std::size_t states) {
  THINWIRE_EXPECTS(states == plan.segments.size() || (states == 0 && recursion.kind == Recursion::Kind::none),
                   "topk: state for " + std::to_string(states) + " segments, the plan has " + std::to_string(plan.segments.size()));
}

void check_wire_size(std::size_t rank, std::size_t given, std::size_t bytes) {
  if (given == bytes) return;
  fail(Errc::corrupt_payload,
       "payload of rank " + std::to_string(rank) + " has " + std::to_string(given) + " bytes, this plan's has " + std::to_string(bytes));
}

}  // namespace thinwire::topk
