// A queue in one block that grows by doubling. An entry's position stays the same while those ahead of it leave.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "protocol/footprint.hpp"

namespace pgsidecar::protocol {

template <class T>
class Ring {
 public:
  std::size_t begin() const { return head_; }  ///< the position of the front
  std::size_t end() const { return tail_; }
  bool empty() const { return head_ == tail_; }
  std::size_t size() const { return tail_ - head_; }
  T& operator[](std::size_t position) { return slots_[position & (slots_.size() - 1)]; }
  const T& operator[](std::size_t position) const { return slots_[position & (slots_.size() - 1)]; }
  T& front() { return (*this)[head_]; }
  const T& front() const { return (*this)[head_]; }

  void push_back(T item) { add() = std::move(item); }
  /// The new back, as T{} is if T isn't trivial.
  T& add() {
    if (size() == slots_.size()) [[unlikely]]
      grow();
    return (*this)[tail_++];
  }
  void drop_front() {
    if constexpr (!std::is_trivially_destructible_v<T>) {
      std::destroy_at(&front());
      std::construct_at(&front());
    }
    ++head_;
    // What a burst has taken is given back.
    if (empty() && slots_.size() > kKept) [[unlikely]]
      std::vector<T>().swap(slots_);
  }
  T pop_front() {
    T item = std::move(front());
    drop_front();
    return item;
  }
  /// All from this position on.
  void truncate(std::size_t position) {
    while (tail_ != position) (*this)[--tail_] = T{};
  }
  std::size_t footprint() const { return protocol::footprint(slots_); }

 private:
  static constexpr std::size_t kKept = 256;

  [[gnu::noinline]] void grow() {
    std::vector<T> larger(slots_.empty() ? 2 : slots_.size() * 2);
    for (std::size_t i = head_; i != tail_; ++i) larger[i & (larger.size() - 1)] = std::move((*this)[i]);
    slots_ = std::move(larger);
  }

  std::vector<T> slots_;  // their number is a power of two
  std::size_t head_ = 0, tail_ = 0;
};

}  // namespace pgsidecar::protocol
