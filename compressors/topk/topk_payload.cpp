#include "compressors/topk/topk_payload.hpp"

#include <string>

#include "compressors/core/error.hpp"
#include "compressors/topk/topk_wire.hpp"

namespace thinwire::topk {
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

}  // namespace thinwire::topk
