#pragma once
// Which instruction set the CPU twins use. All twins give the same bits, so this is a matter of speed and of tests.

#include <string_view>

namespace thinwire {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

const char* to_string(Isa isa) noexcept;
/// Whether this CPU (and OS) can run it.
bool cpu_supports(Isa isa) noexcept;
/// "auto" is the best that this CPU has. @throws Error{invalid_config} on a word that is none of auto|scalar|avx2|avx512, or an ISA this
/// CPU lacks.
Isa parse_isa(std::string_view word);
/// The best one, or what THINWIRE_ISA=scalar|avx2|avx512 asks for. Read once. @throws Error{invalid_config} on another word or an ISA this
/// CPU lacks.
Isa active_isa();

}  // namespace thinwire
