#pragma once
// The configuration grammar (docs: README "Configuration"), parsed once, here, for C++ and Python alike.
//   config := [ preset-spec ] { slot "=" spec }      spec := name [ ":" key "=" value { "," key "=" value } ]

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace thinwire {

/// One slot's choice with every key filled in, in the order of the grammar's table. Values are canonical text: numbers in shortest
/// round-trip form.
struct Spec {
  std::string name;
  std::vector<std::pair<std::string, std::string>> values;

  /// @throws Error{internal} if the key is not in the table of this name, or is not of the kind that was asked for.
  const std::string& text(std::string_view key) const;
  double number(std::string_view key) const;
  std::uint64_t integer(std::string_view key) const;
  std::vector<double> numbers(std::string_view key) const;
  bool flag(std::string_view key) const { return number(key) != 0; }

  std::string str() const;
  bool operator==(const Spec&) const = default;
};

/// Immutable value; equal configs have equal str(). A default-constructed Config is codec=none with every default.
class Config {
 public:
  Config();
  /// @throws Error{invalid_config} saying what was given, where, and what is allowed: unknown slots, names and keys, malformed or
  /// out-of-range values, combinations that mean nothing, an empty text, a slot given twice.
  static Config parse(std::string_view text);

  const Spec& codec() const noexcept { return codec_; }
  const Spec& feedback() const noexcept { return feedback_; }
  const Spec& target() const noexcept { return target_; }
  const Spec& exchange() const noexcept { return exchange_; }
  const Spec& policy() const noexcept { return policy_; }
  std::uint64_t min_numel() const noexcept { return min_numel_; }
  std::uint64_t start_step() const noexcept { return start_step_; }
  double timeout_seconds() const noexcept { return timeout_; }
  std::uint64_t seed() const noexcept { return seed_; }
  std::uint64_t check_every() const noexcept { return check_every_; }

  /// Every slot with every default filled in; parse(str()) == *this.
  std::string str() const;
  bool operator==(const Config&) const = default;

 private:
  struct Fields;  // which member each slot of the grammar's table fills
  void fill(std::string_view text, bool preset_allowed);

  Spec codec_, feedback_, target_, exchange_, policy_;
  std::uint64_t min_numel_ = 16384, start_step_ = 0, seed_ = 0, check_every_ = 0;
  double timeout_ = 600;
};

}  // namespace thinwire
