#include "compressors/core/config_values.hpp"

#include <algorithm>

#include "compressors/core/error.hpp"

namespace thinwire::grammar {

void refuse(const std::string& what) { fail(Errc::invalid_config, what); }

std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return text.size() > kLongest ? out + "..." : out;
}

std::string quoted(std::string_view text) { return "'" + shown(text) + "'"; }

std::string joined(const Texts& words) {
  std::string out;
  for (const std::string_view word : words) out += (out.empty() ? "" : ", ") + std::string(word);
  return out;
}

Texts split(std::string_view text, char separator) {
  Texts parts;
  for (;;) {
    const std::size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

namespace {

char lower(char c) noexcept { return c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c; }

/// Insertions, deletions, replacements and swaps of neighbours between two short words, case aside.
std::size_t typing_errors(std::string_view a, std::string_view b) {
  std::vector<std::size_t> before, above, row(b.size() + 1);  // two rows back, one row back, this one
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    before = std::move(above);
    above = row;
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const bool same = lower(a[i - 1]) == lower(b[j - 1]);
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (same ? 0 : 1)});
      if (i > 1 && j > 1 && lower(a[i - 1]) == lower(b[j - 2]) && lower(a[i - 2]) == lower(b[j - 1]))
        row[j] = std::min(row[j], before[j - 2] + 1);
    }
  }
  return row.back();
}

/// Text such as "(0, 1]".
bool inside(double value, std::string_view interval) {
  const std::size_t comma = interval.find(", ");
  const std::string_view low = interval.substr(1, comma - 1), high = interval.substr(comma + 2, interval.size() - comma - 3);
  const double least = parse_number<double>(low).value();
  const bool above = interval.front() == '[' ? value >= least : value > least;
  if (high == "inf") return above;
  const double most = parse_number<double>(high).value();
  return above && (interval.back() == ']' ? value <= most : value < most);
}

std::string canonical_real(const std::string& given, const Key& key, std::string_view text) {
  const std::optional<double> value = parse_number<double>(text);
  if (!value) refuse(given + " is not a finite decimal number; allowed: a number in " + std::string(key.allowed));
  if (!inside(*value, key.allowed)) refuse(given + " is outside " + std::string(key.allowed));
  return canonical_number(*value);
}

}  // namespace

std::string suggestion(std::string_view given, const Texts& valid) {
  std::size_t least = std::max<std::size_t>(1, given.size() / 3) + 1;  // one error in three letters still looks like a typo
  std::string_view nearest;
  if (given.size() <= 32) {
    for (const std::string_view word : valid) {
      const std::size_t errors = typing_errors(given, word);
      if (errors < least) least = errors, nearest = word;
    }
  }
  return nearest.empty() ? ";" : ", did you mean '" + std::string(nearest) + "'?";
}

std::string canonical(const std::string& where, const Key& key, std::string_view text) {
  const std::string given = where + std::string(key.name) + "=" + shown(text);
  switch (key.kind) {
    case Kind::number:
      return canonical_real(given, key, text);
    case Kind::integer: {
      const std::optional<std::uint64_t> value = parse_number<std::uint64_t>(text);
      if (!value) refuse(given + " is not a whole number of 64 bits; allowed: an integer in " + std::string(key.allowed));
      if (!inside(double(*value), key.allowed)) refuse(given + " is outside " + std::string(key.allowed));
      return canonical_number(*value);
    }
    case Kind::flag:
      if (text != "0" && text != "1") refuse(given + " is neither 0 nor 1");
      return std::string(text);
    case Kind::word: {
      const Texts words = split(key.allowed, '|');
      if (std::find(words.begin(), words.end(), text) == words.end()) {
        refuse(given + " is not valid" + suggestion(text, words) + " allowed: " + joined(words));
      }
      return std::string(text);
    }
    case Kind::integer_or_word:
    case Kind::number_or_word: {
      const std::size_t bar = key.allowed.rfind('|');
      const Texts words = split(key.allowed.substr(0, bar), '|');
      if (std::find(words.begin(), words.end(), text) != words.end()) return std::string(text);
      const bool whole = key.kind == Kind::integer_or_word;
      if (whole ? !parse_number<std::uint64_t>(text) : !parse_number<double>(text))
        refuse(given + " is not valid" + suggestion(text, words) + " allowed: " + joined(words) +
               (whole ? ", or an integer in " : ", or a number in ") + std::string(key.allowed.substr(bar + 1)));
      const Key number{key.name, whole ? Kind::integer : Kind::number, {}, key.allowed.substr(bar + 1), {}};
      return canonical(where, number, text);
    }
    case Kind::number_list: {
      std::string list;
      for (const std::string_view entry : split(text, '/')) {
        list += (list.empty() ? "" : "/") + canonical_real(given + ": entry " + quoted(entry), key, entry);
      }
      return list;
    }
  }
  fail(Errc::internal, "a key of unknown kind: " + std::string(key.name));
}

}  // namespace thinwire::grammar
