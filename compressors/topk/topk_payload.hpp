#pragma once
// What the host's and the GPU's codec say alike: the header of a payload, and which arguments they refuse.

#include "compressors/core/codec.hpp"
#include "compressors/core/wire.hpp"
#include "compressors/topk/topk.hpp"

namespace thinwire::topk {

wire::Header payload_header(const Plan& plan, const TopKOptions& options, std::size_t bytes, std::uint32_t flags) noexcept;

// Each throws Error{invalid_argument} naming what was given.
void check_parts(const Plan& plan);
void check_payload_size(std::size_t given, std::size_t bytes);
void check_workspace(std::size_t given, std::size_t bytes);
void check_input(const Plan& plan, ConstBytes grad);
void check_message(int round, ConstBytes message);
void check_output(const Plan& plan, ConstBytes out);
/// As many states as segments, or none and no feedback.
void check_state(const Plan& plan, const Recursion& recursion, std::size_t states);

/// @throws Error{corrupt_payload}.
void check_wire_size(std::size_t rank, std::size_t given, std::size_t bytes);

}  // namespace thinwire::topk
