#pragma once
// What compressors/registry.cpp, the one file that names every family, provides: construction from a Config and the tables of its grammar.

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/core/codec.hpp"
#include "compressors/core/config.hpp"
#include "compressors/core/isa.hpp"
#include "compressors/core/policy.hpp"
#include "compressors/core/recursion.hpp"

namespace thinwire {

/// The configured codec, or null for codec=none. `isa` chooses the CPU twin; all give the same bits.
std::unique_ptr<const Codec> make_codec(const Config& config, Isa isa = active_isa());
/// The same for device memory. @throws Error{unsupported} in a build without CUDA.
std::unique_ptr<const Codec> make_device_codec(const Config& config);
Recursion make_recursion(const Config& config);
/// Never null: policy=none gives every parameter the codec's own setting.
std::unique_ptr<const RatioPolicy> make_policy(const Config& config);

namespace grammar {

enum class Kind { number, integer, flag, word, number_list, integer_or_word, number_or_word };

struct Key {
  std::string_view name;
  Kind kind;
  std::string_view fallback;  ///< default, canonical text; empty: the key must be given
  std::string_view allowed;   ///< number, integer: an interval such as "(0, 1]"; word: "fp32|bf16|fp16"; number_list: an interval for each;
                              ///< integer_or_word, number_or_word: "auto|[0, inf)"
  std::string_view help;
};
struct Name {
  std::string_view name;
  std::span<const Key> keys;
  std::string_view help;
};
struct Slot {
  std::string_view name;
  std::span<const Name> names;  ///< the first is the default; empty: the slot is a plain number described by `plain`
  Key plain;
};
/// A preset is only a name for a setting of the slots.
struct Preset {
  Name name;
  std::string (*expand)(const Spec& filled);  ///< slots in the grammar's own words
};

std::span<const Slot> slots();
std::span<const Preset> presets();
/// The whole grammar as text for --help: one line per slot, name and key.
std::string help();
/// Combinations across slots. @throws Error{invalid_config}.
void check_combination(const Config& config);
/// What is allowed and likely to go wrong, a sentence each: what it is, what happens, what to choose.
std::vector<std::string> warnings(const Config& config);
/// What a config suits, and what to choose elsewhere, in whole sentences. @source docs/error_control.md
std::vector<std::string> hints(const Config& config);

}  // namespace grammar
}  // namespace thinwire
