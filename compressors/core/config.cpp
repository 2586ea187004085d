// The parser of the configuration grammar. It is driven by the tables of compressors/registry.cpp and reads in three steps:
//   1. split_tokens   blanks separate tokens, except beside one of : = , / where they mean nothing
//   2. parse_spec     name[:key=value,...] against a table: every key filled in, every value checked and rewritten in its canonical form
//   3. Config::fill   tokens into slots; a preset is expanded into the grammar's own words and goes the same way

#include "compressors/core/config.hpp"

#include <algorithm>
#include <optional>
#include <set>

#include "compressors/core/config_values.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/registry.hpp"

namespace thinwire {

namespace {

using namespace grammar;

template <class Entry>
Texts names_of(std::span<const Entry> entries) {
  Texts names;
  for (const Entry& entry : entries) names.push_back(entry.name);
  return names;
}

template <class Entry>
const Entry* find(std::span<const Entry> entries, std::string_view name) {
  const auto at = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.name == name; });
  return at == entries.end() ? nullptr : &*at;
}

const Preset* find_preset(std::string_view name) {
  for (const Preset& preset : presets()) {
    if (preset.name.name == name) return &preset;
  }
  return nullptr;
}

Texts preset_names() {
  Texts names;
  for (const Preset& preset : presets()) names.push_back(preset.name.name);
  return names;
}

bool is_blank(char c) noexcept { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_joint(char c) noexcept { return c == ':' || c == '=' || c == ',' || c == '/'; }

std::vector<std::string> split_tokens(std::string_view text) {
  std::vector<std::string> tokens;
  bool blank = true;
  for (const char c : text) {
    if (is_blank(c)) {
      blank = true;
      continue;
    }
    const bool starts = tokens.empty() || (blank && !is_joint(c) && !is_joint(tokens.back().back()));
    if (starts) tokens.emplace_back();
    tokens.back() += c;
    blank = false;
  }
  return tokens;
}

/// `place`: what the name is called in error messages, "topk", or "codec=none" where the name alone could mean several.
Spec parse_spec(const Name& name, const std::string& place, std::optional<std::string_view> settings) {
  const std::string where = place + ": ";
  const Texts keys = names_of(name.keys);
  const std::string takes = keys.empty() ? " it takes no keys" : " its keys are " + joined(keys);
  Spec spec{std::string(name.name), {}};
  for (const Key& key : name.keys) spec.values.emplace_back(key.name, key.fallback);

  std::set<std::string_view> given;
  for (const std::string_view setting : settings ? split(*settings, ',') : Texts()) {
    const std::size_t equals = setting.find('=');
    const std::string_view word = setting.substr(0, equals);
    if (equals == std::string_view::npos) refuse(where + quoted(setting) + " is not key=value;" + takes);
    const Key* const key = find(name.keys, word);
    if (key == nullptr) {
      const bool slot = find(slots(), word) != nullptr;
      refuse(where + "unknown key " + quoted(word) + (slot ? " (a slot: put a blank before it, not a comma);" : suggestion(word, keys)) +
             takes);
    }
    if (!given.insert(key->name).second) refuse(where + std::string(key->name) + " is given twice");
    spec.values[std::size_t(key - name.keys.data())].second = canonical(where, *key, setting.substr(equals + 1));
  }
  for (const Key& key : name.keys) {
    if (!key.fallback.empty() || given.contains(key.name)) continue;
    refuse(where + std::string(key.name) + " must be given: " + std::string(key.help) + ", in " + std::string(key.allowed));
  }
  return spec;
}

/// Splits "name:settings" at the first colon.
std::pair<std::string_view, std::optional<std::string_view>> split_spec(std::string_view text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string_view::npos) return {text, std::nullopt};
  return {text.substr(0, colon), text.substr(colon + 1)};
}

std::string place_of(const Slot& slot, const Name& name) {
  int meanings = find_preset(name.name) != nullptr ? 1 : 0;
  for (const Slot& other : slots()) meanings += find(other.names, name.name) != nullptr ? 1 : 0;
  return (meanings > 1 ? std::string(slot.name) + "=" : std::string()) + std::string(name.name);
}

Spec parse_choice(const Slot& slot, std::string_view text) {
  const auto [word, settings] = split_spec(text);
  const Name* const name = find(slot.names, word);
  if (name != nullptr) return parse_spec(*name, place_of(slot, *name), settings);
  const Texts valid = names_of(slot.names);
  refuse(std::string(slot.name) + "=" + shown(word) + " is unknown" + suggestion(word, valid) + " allowed: " + joined(valid));
}

/// For a word that is a key somewhere: who takes it.
std::string owners_of_key(std::string_view word) {
  std::string owners;
  const auto add = [&](const std::string& owner) { owners += (owners.empty() ? "" : ", ") + owner; };
  for (const Preset& preset : presets()) {
    if (find(preset.name.keys, word) != nullptr) add(std::string(preset.name.name));
  }
  for (const Slot& slot : slots()) {
    for (const Name& name : slot.names) {
      if (find(name.keys, word) != nullptr) add(std::string(slot.name) + "=" + std::string(name.name));
    }
  }
  return owners;
}

[[noreturn]] void refuse_slot(std::string_view word) {
  const Texts valid = names_of(slots());
  const std::string owners = owners_of_key(word);
  const std::string hint =
      owners.empty() ? suggestion(word, valid) : " (a key of " + owners + ": keys follow their name, name:key=value,key=value);";
  refuse("unknown slot " + quoted(word) + hint + " slots: " + joined(valid));
}

[[noreturn]] void refuse_preset(std::string_view word, std::string_view token) {
  for (const Slot& slot : slots()) {
    if (find(slot.names, word) == nullptr) continue;
    refuse(quoted(word) + " is not a preset but a value of the slot " + std::string(slot.name) + ": write " + std::string(slot.name) + "=" +
           shown(token));
  }
  if (find(slots(), word) != nullptr) refuse("the slot " + quoted(word) + " has no value: write " + std::string(word) + "=...");
  refuse("unknown preset " + quoted(word) + suggestion(word, preset_names()) + " presets: " + joined(preset_names()) +
         "; anything else is slot=value with one of the slots " + joined(names_of(slots())));
}

/// A preset with what its user gave.
struct GivenPreset {
  const Preset* preset;
  Spec spec;
  Texts keys;  ///< the given ones

  GivenPreset(const Preset& which, std::string_view word, std::optional<std::string_view> settings)
      : preset(&which), spec(parse_spec(which.name, std::string(word), settings)) {
    for (const std::string_view setting : settings ? split(*settings, ',') : Texts()) keys.push_back(setting.substr(0, setting.find('=')));
  }
  /// A slot replaces what the preset says of it as a whole. @throws where that would drop a key without a word.
  void check_replaced(const Slot& slot, std::string_view token) const {
    const std::string said = slot_text(spec, slot);
    for (const std::string_view key : keys) {
      Spec without = spec;
      for (auto& [name, value] : without.values) {
        if (name == key) value = find(preset->name.keys, key)->fallback;
      }
      const std::string setting = std::string(key) + "=" + spec.text(key);
      if (said == slot_text(without, slot) && said.find(":" + setting) == said.npos && said.find("," + setting) == said.npos) continue;
      refuse(shown(token) + " replaces all that the preset " + spec.name + " says of the slot, and " + setting +
             " would be lost: write it into the slot, or leave the slot out");
    }
  }

 private:
  std::string slot_text(const Spec& filled, const Slot& slot) const {
    for (const std::string& token : split_tokens(preset->expand(filled))) {
      if (token.starts_with(std::string(slot.name) + "=")) return token;
    }
    return "";
  }
};

}  // namespace

const std::string& Spec::text(std::string_view key) const {
  for (const auto& [given, value] : values) {
    if (given == key) return value;
  }
  fail(Errc::internal, name + " has no key " + quoted(key));
}

double Spec::number(std::string_view key) const {
  if (const auto value = parse_number<double>(text(key))) return *value;
  fail(Errc::internal, name + ": " + quoted(key) + " is not a number");
}

std::uint64_t Spec::integer(std::string_view key) const {
  if (const auto value = parse_number<std::uint64_t>(text(key))) return *value;
  fail(Errc::internal, name + ": " + quoted(key) + " is not an integer");
}

std::vector<double> Spec::numbers(std::string_view key) const {
  std::vector<double> list;
  for (const std::string_view entry : split(text(key), '/')) {
    const auto value = parse_number<double>(entry);
    if (!value) fail(Errc::internal, name + ": " + quoted(key) + " is not a list of numbers");
    list.push_back(*value);
  }
  return list;
}

std::string Spec::str() const {
  std::string text = name;
  for (const auto& [key, value] : values) text += (&key == &values.front().first ? ":" : ",") + key + "=" + value;
  return text;
}

struct Config::Fields {
  static Spec Config::*choice(std::string_view slot) {
    if (slot == "codec") return &Config::codec_;
    if (slot == "feedback") return &Config::feedback_;
    if (slot == "target") return &Config::target_;
    if (slot == "exchange") return &Config::exchange_;
    if (slot == "policy") return &Config::policy_;
    fail(Errc::internal, "Config has no member for the slot " + std::string(slot));
  }
  static std::uint64_t Config::*integer(std::string_view slot) {
    if (slot == "min_numel") return &Config::min_numel_;
    if (slot == "start_step") return &Config::start_step_;
    if (slot == "seed") return &Config::seed_;
    if (slot == "check_every") return &Config::check_every_;
    fail(Errc::internal, "Config has no member for the slot " + std::string(slot));
  }
  static double Config::*number(std::string_view slot) {
    if (slot == "timeout") return &Config::timeout_;
    fail(Errc::internal, "Config has no member for the slot " + std::string(slot));
  }

  /// Sets one slot from the user's text or, for defaults, from the table's.
  static void set(Config& config, const Slot& slot, std::string_view text) {
    if (!slot.names.empty()) {
      config.*choice(slot.name) = parse_choice(slot, text);
    } else if (slot.plain.kind == Kind::integer) {
      config.*integer(slot.name) = parse_number<std::uint64_t>(canonical("", slot.plain, text)).value();
    } else {
      config.*number(slot.name) = parse_number<double>(canonical("", slot.plain, text)).value();
    }
  }
  static std::string get(const Config& config, const Slot& slot) {
    if (!slot.names.empty()) return (config.*choice(slot.name)).str();
    return slot.plain.kind == Kind::integer ? canonical_number(config.*integer(slot.name)) : canonical_number(config.*number(slot.name));
  }
};

Config::Config() {
  for (const Slot& slot : slots()) Fields::set(*this, slot, slot.names.empty() ? slot.plain.fallback : slot.names.front().name);
}

void Config::fill(std::string_view text, bool preset_allowed) {
  std::set<std::string_view> given;
  std::optional<GivenPreset> preset_given;
  bool first = true;
  for (const std::string& token : split_tokens(text)) {
    const std::size_t end = token.find_first_of(":=");
    const std::string_view word = std::string_view(token).substr(0, end);
    if (end == std::string::npos || token[end] == ':') {
      const Preset* const preset = find_preset(word);
      if (preset == nullptr) refuse_preset(word, token);
      if (!first || !preset_allowed) refuse("the preset " + quoted(word) + " must come first, and there can be one only");
      preset_given.emplace(*preset, word, split_spec(token).second);
      fill(preset->expand(preset_given->spec), false);
    } else {
      const Slot* const slot = find(slots(), word);
      if (slot == nullptr) refuse_slot(word);
      if (!given.insert(slot->name).second) refuse("the slot " + std::string(slot->name) + " is given twice");
      if (preset_given) preset_given->check_replaced(*slot, token);
      Fields::set(*this, *slot, std::string_view(token).substr(end + 1));
    }
    first = false;
  }
  if (first) {
    refuse("the configuration is empty; codec=none is dense training. Presets: " + joined(preset_names()) +
           "; slots: " + joined(names_of(slots())));
  }
}

Config Config::parse(std::string_view text) {
  Config config;
  config.fill(text, true);
  check_combination(config);
  return config;
}

std::string Config::str() const {
  std::string text;
  for (const Slot& slot : slots()) text += (text.empty() ? "" : " ") + std::string(slot.name) + "=" + Fields::get(*this, slot);
  return text;
}

}  // namespace thinwire
