// What the fuzz targets share. Each is a file with a libFuzzer entry and seeds(): built with clang and PGSIDECAR_FUZZ it
// searches (integration/fuzz.sh); in every other build it tries its seeds and fixed mutations of them, as a test.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
std::vector<std::string> seeds();

/// An invariant; a failure is a crash, which libFuzzer keeps with its input.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

/// Bytes in a buffer of exactly their size, so that a sanitizer sees the first byte beyond.
class Exact {
 public:
  Exact(const void* data, std::size_t size) : bytes_(new std::uint8_t[size]), size_(size) {
    if (size > 0) std::memcpy(bytes_.get(), data, size);
  }
  explicit Exact(std::string_view s) : Exact(s.data(), s.size()) {}
  std::span<const std::uint8_t> view() const { return {bytes_.get(), size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(bytes_.get()), size_}; }

 private:
  std::unique_ptr<std::uint8_t[]> bytes_;
  std::size_t size_;
};

/// Decisions out of the input; zeros at its end.
class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : p_(data), end_(data + size) {}
  bool more() const { return p_ != end_; }
  std::uint8_t next() { return more() ? *p_++ : std::uint8_t{0}; }
  std::uint8_t below(std::uint8_t n) { return static_cast<std::uint8_t>(next() % n); }
  std::string_view take(std::size_t n) {
    n = std::min(n, static_cast<std::size_t>(end_ - p_));
    const std::string_view s(reinterpret_cast<const char*>(p_), n);
    p_ += n;
    return s;
  }

 private:
  const std::uint8_t* p_;
  const std::uint8_t* end_;
};
