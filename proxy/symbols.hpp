// Names of functions by their addresses: this executable's own from its symbol table, unless it was stripped, and what shared
// libraries export. Read when made, so make one when it is needed.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace pgsidecar::proxy {

/// Without parameters, template arguments and return type, which would make frames unreadable.
std::string short_name(std::string_view demangled);

class Symbols {
 public:
  Symbols();
  ~Symbols();
  Symbols(const Symbols&) = delete;
  Symbols& operator=(const Symbols&) = delete;

  /// Of the function around an address; the file in brackets if that isn't known. No semicolons.
  const std::string& name(const void* address);

 private:
  struct Symbol {
    std::uintptr_t begin, end;  // in the file's own addresses
    const char* name;
  };
  void read(std::uintptr_t image, std::size_t size);
  std::string find(std::uintptr_t address) const;

  std::uintptr_t base_ = 0;
  void* image_ = nullptr;  // the executable's file
  std::size_t size_ = 0;
  std::vector<Symbol> symbols_;
  std::unordered_map<const void*, std::string> names_;
};

}  // namespace pgsidecar::proxy
