#include "compressors/core/isa.hpp"

#include <cstdlib>
#include <string>

#include "compressors/core/error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace thinwire {

namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};

#if defined(__x86_64__)
bool has_avx2_set() noexcept {
  // f16c by cpuid: clang's __builtin_cpu_supports does not know the word. That the OS saves the wide registers is part of what the builtin
  // says of avx2.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512_set() noexcept {
  return has_avx2_set() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2_set() noexcept { return false; }
bool has_avx512_set() noexcept { return false; }
#endif

Isa best() noexcept {
  Isa found = Isa::scalar;
  for (const Isa isa : kAll) {
    if (cpu_supports(isa)) found = isa;
  }
  return found;
}

}  // namespace

const char* to_string(Isa isa) noexcept { return isa == Isa::scalar ? "scalar" : isa == Isa::avx2 ? "avx2" : "avx512"; }

bool cpu_supports(Isa isa) noexcept {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return has_avx2_set();
    case Isa::avx512:
      return has_avx512_set();
  }
  return false;
}

Isa parse_isa(std::string_view word) {
  if (word == "auto") return best();
  for (const Isa isa : kAll) {
    if (word != to_string(isa)) continue;
    if (cpu_supports(isa)) return isa;
    fail(Errc::invalid_config, "isa: this CPU lacks " + std::string(word) + "; the best it has is " + to_string(best()));
  }
  fail(Errc::invalid_config, "isa: '" + std::string(word) + "' is none of auto, scalar, avx2, avx512");
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* const word = std::getenv("THINWIRE_ISA");
    if (word == nullptr || *word == '\0') return best();
    try {
      return parse_isa(word);
    } catch (const Error& error) { fail(error.code(), "THINWIRE_ISA=" + std::string(word) + ": " + error.what()); }
  }();
  return isa;
}

}  // namespace thinwire
