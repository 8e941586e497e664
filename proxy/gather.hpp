// What one turn of the loop sends to one connection: ranges of the bytes that were read, as they are, and small messages
// of the proxy's own between them. One per direction and loop, reused, so that a turn allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace pgsidecar::proxy {

class Gather {
 public:
  using Piece = std::span<const std::uint8_t>;

  void add(const std::uint8_t* bytes, std::size_t size) {
    if (size == 0) return;
    if (!parts_.empty() && parts_.back().from && parts_.back().from + parts_.back().size == bytes)
      parts_.back().size += size;
    else
      parts_.push_back({bytes, 0, size});
  }
  /// Appends messages of the proxy's own: `write(std::string&)`.
  template <class Write>
  void own(Write&& write) {
    const std::size_t begin = own_.size();
    write(own_);
    if (own_.size() == begin) return;
    if (!parts_.empty() && !parts_.back().from)
      parts_.back().size += own_.size() - begin;
    else
      parts_.push_back({nullptr, begin, own_.size() - begin});
  }
  std::size_t size() const {
    std::size_t n = 0;
    for (const Part& part : parts_) n += part.size;
    return n;
  }
  bool empty() const { return parts_.empty(); }
  std::span<const Piece> pieces() {
    pieces_.clear();
    for (const Part& part : parts_)
      pieces_.emplace_back(part.from ? part.from : reinterpret_cast<const std::uint8_t*>(own_.data()) + part.offset, part.size);
    return pieces_;
  }
  void clear() {
    parts_.clear();
    own_.clear();
  }

 private:
  struct Part {
    const std::uint8_t* from;  // nullptr: at `offset` of own_
    std::size_t offset, size;
  };
  std::vector<Part> parts_;
  std::vector<Piece> pieces_;
  std::string own_;
};

}  // namespace pgsidecar::proxy
