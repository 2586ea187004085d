#include "compressors/core/codec_checks.hpp"

#include <string>

#include "compressors/core/error.hpp"

namespace thinwire {

void CodecChecks::bounds(const Plan& plan, std::size_t elements) const {
  for (const Segment& segment : plan.segments) {
    THINWIRE_EXPECTS(segment.count <= elements && segment.first <= elements - segment.count,
                     std::string(codec) + ": parameter " + std::to_string(segment.parameter) + " has elements [" +
                         std::to_string(segment.first) + ", " + std::to_string(segment.first + segment.count) + ") of a flat buffer of " +
                         std::to_string(elements));
  }
}

void CodecChecks::payload_size(std::size_t given, std::size_t bytes) const {
  THINWIRE_EXPECTS(given == bytes,
                   std::string(codec) + ": the payload has " + std::to_string(given) + " bytes, this plan's has " + std::to_string(bytes));
}

void CodecChecks::workspace(std::size_t given, std::size_t bytes) const {
  THINWIRE_EXPECTS(given >= bytes, std::string(codec) + ": the workspace has " + std::to_string(given) + " bytes, this plan needs " +
                                       std::to_string(bytes));
}

void CodecChecks::input(const Plan& plan, ConstBytes grad) const {
  THINWIRE_EXPECTS(grad.dtype != DType::u8, std::string(codec) + ": gradients are fp32, bf16 or fp16");
  bounds(plan, grad.count());
}

void CodecChecks::message(int round, ConstBytes message) const {
  THINWIRE_EXPECTS(round == 0, std::string(codec) + " has one round, round " + std::to_string(round) + " was asked for");
  THINWIRE_EXPECTS(message.dtype == DType::fp32, std::string("a message is fp32, this one is ") + to_string(message.dtype));
}

void CodecChecks::output(const Plan& plan, ConstBytes out) const {
  THINWIRE_EXPECTS(out.dtype != DType::u8, std::string(codec) + ": the output is fp32, bf16 or fp16");
  bounds(plan, out.count());
}

void CodecChecks::state(const Plan& plan, const Recursion& recursion, std::size_t states) const {
  THINWIRE_EXPECTS(
      states == plan.segments.size() || (states == 0 && recursion.kind == Recursion::Kind::none && !recursion.averaged),
      std::string(codec) + ": state for " + std::to_string(states) + " segments, the plan has " + std::to_string(plan.segments.size()));
}

void CodecChecks::wire_size(std::size_t rank, std::size_t given, std::size_t bytes) const {
  if (given == bytes) return;
  fail(Errc::corrupt_payload,
       "payload of rank " + std::to_string(rank) + " has " + std::to_string(given) + " bytes, this plan's has " + std::to_string(bytes));
}

}  // namespace thinwire
