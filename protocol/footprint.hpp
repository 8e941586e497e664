// About how much of the heap containers take, for the profile: by their sizes and capacities, so that asking is cheap.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace pgsidecar::protocol {

constexpr std::size_t kBlock = 16;  ///< what malloc itself takes for a block, rounding included
constexpr std::size_t kNode = 48;   ///< a node of a list, map or set, or a shared object's count, besides its value

inline std::size_t footprint(const std::string& text) {
  return text.capacity() <= 15 ? 0 : text.capacity() + kBlock;  // shorter ones live in the object
}
template <class T>
std::size_t footprint(const std::vector<T>& items) {
  return items.capacity() == 0 ? 0 : items.capacity() * sizeof(T) + kBlock;
}
/// Of a flat map, without what its values hold.
template <class Map>
std::size_t footprint_of_slots(const Map& map) {
  return map.bucket_count() * (sizeof(typename Map::value_type) + 1);
}
/// Of a map of nodes, without what its values hold.
template <class Map>
std::size_t footprint_of_nodes(const Map& map) {
  return map.size() * (sizeof(typename Map::value_type) + kNode);
}

}  // namespace pgsidecar::protocol
