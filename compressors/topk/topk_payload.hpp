#pragma once
// What the host's and the GPU's codec say alike: the header of a payload, and which arguments they refuse.

#include "compressors/core/codec_checks.hpp"
#include "compressors/core/plan.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire::topk {

wire::Header payload_header(const Plan& plan, const TopKOptions& options, std::size_t bytes, std::uint32_t flags) noexcept;

inline constexpr CodecChecks kChecks{"topk"};

/// @throws Error{invalid_argument}: payloads of top-k are gathered whole.
void check_parts(const Plan& plan);

}  // namespace thinwire::topk
