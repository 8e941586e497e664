// A small JSON writer and the units of the API's documents: milliseconds, seconds, megabytes, ISO 8601.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "admin/render.hpp"

namespace pgsidecar::admin {

/// Appends a document piece by piece. Names and texts become valid UTF-8.
class Json {
 public:
  Json& key(std::string_view name) {
    comma();
    quote(name);
    out_ += ':';
    after_key_ = true;
    return *this;
  }
  Json& begin(char bracket) {
    comma();
    out_ += bracket;
    first_ = true;
    return *this;
  }
  Json& end(char bracket) {
    out_ += bracket;
    first_ = false;
    return *this;
  }
  Json& string(std::string_view value) {
    comma();
    quote(value);
    return *this;
  }
  Json& raw(std::string_view value) {
    comma();
    out_ += value;
    return *this;
  }
  Json& field(std::string_view name, std::string_view value) { return key(name).string(value); }
  Json& field(std::string_view name, const char* value) { return key(name).string(value); }
  Json& field(std::string_view name, double value) { return key(name).raw(number(value)); }
  Json& field(std::string_view name, std::uint64_t value) { return key(name).raw(std::to_string(value)); }
  Json& field(std::string_view name, bool value) { return key(name).raw(value ? "true" : "false"); }
  Json& null(std::string_view name) { return key(name).raw("null"); }
  template <class T>
  Json& field(std::string_view name, const std::optional<T>& value) {
    return value ? field(name, *value) : null(name);
  }
  std::string take() {
    out_ += '\n';
    return std::move(out_);
  }

 private:
  void comma() {
    if (!first_ && !after_key_) out_ += ',';
    first_ = after_key_ = false;
  }
  void quote(std::string_view text) {
    static constexpr char kHex[] = "0123456789abcdef";
    out_ += '"';
    for (const char c : to_utf8(text)) {
      if (c == '"' || c == '\\') {
        out_ += '\\';
        out_ += c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        out_ += "\\u00";
        out_ += kHex[(c >> 4) & 15];
        out_ += kHex[c & 15];
      } else {
        out_ += c;
      }
    }
    out_ += '"';
  }

  std::string out_;
  bool first_ = true, after_key_ = false;
};

double millis(double micros);
double millis(std::uint64_t micros);
double megabytes(std::uint64_t bytes);
std::string iso8601(Clock::time_point time);  ///< UTC, with milliseconds

}  // namespace pgsidecar::admin
