#pragma once
// The words and values of the configuration grammar: what was typed, in error messages, and its one canonical form. std::from_chars and
// to_chars know no locale, and to_chars' shortest form reads back as the same number.

#include <charconv>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "compressors/core/registry.hpp"

namespace thinwire::grammar {

using Texts = std::vector<std::string_view>;

/// @throws Error{invalid_config}.
[[noreturn]] void refuse(const std::string& what);

/// What the user typed, fit for an error message: printable ASCII of bounded length, whatever the bytes were.
std::string shown(std::string_view text);
std::string quoted(std::string_view text);
std::string joined(const Texts& words);
Texts split(std::string_view text, char separator);
/// ", did you mean 'x'?" for the valid word nearest to `given`, or ";" where none is near.
std::string suggestion(std::string_view given, const Texts& valid);

template <class T>
std::string canonical_number(T value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value);
  return {text, end.ptr};
}

/// The whole text as a T, or nothing. Never NaN or infinite; -0 becomes 0, so that equal numbers have equal texts.
template <class T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end.ec != std::errc() || end.ptr != text.data() + text.size()) return std::nullopt;
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isfinite(value)) return std::nullopt;
  }
  return value + T(0);
}

/// The canonical text of a value. `where`: "topk: " for the key of a spec, "" for a slot that is a plain number. @throws
/// Error{invalid_config}.
std::string canonical(const std::string& where, const Key& key, std::string_view text);

}  // namespace thinwire::grammar
