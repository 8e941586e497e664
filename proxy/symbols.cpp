#include "proxy/symbols.hpp"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace pgsidecar::proxy {

namespace {

/// Where the executable was loaded: the first that is told of.
int find_base(dl_phdr_info* info, std::size_t /*size*/, void* base) {
  *static_cast<std::uintptr_t*>(base) = info->dlpi_addr;
  return 1;
}

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return short_name(status == 0 ? text.get() : name);
}

}  // namespace

std::string short_name(std::string_view demangled) {
  static constexpr std::string_view kAnonymous = "(anonymous namespace)::", kOperator = "operator";
  std::string out;
  int depth = 0;
  for (std::size_t at = 0; at < demangled.size(); ++at) {
    const std::string_view left = demangled.substr(at);
    if (left.starts_with(kAnonymous)) {
      at += kAnonymous.size() - 1;
      continue;
    }
    if (depth == 0 && left.starts_with(kOperator)) {
      std::size_t end = left.find_first_not_of("<>=-!+*/%&|^~[],", kOperator.size());
      if (end == kOperator.size() && left.substr(end).starts_with("()")) end += 2;
      out += left.substr(0, end);
      if (end == std::string_view::npos) break;
      at += end - 1;
      continue;
    }
    const char c = left.front();
    if (c == '<' || c == '(') ++depth;
    if (depth == 0) out += c == ';' ? ':' : c;
    if (depth > 0 && (c == '>' || c == ')')) --depth;
  }
  out.resize(std::min(out.find(" ["), out.size()));  // [clone .cold]
  if (out.ends_with(" const")) out.resize(out.size() - 6);
  while (out.ends_with(' ')) out.pop_back();  // operator<< <char>
  const std::size_t space = out.rfind(' ');
  return space == std::string::npos || std::string_view(out).substr(0, space).ends_with(kOperator) ? out : out.substr(space + 1);
}

Symbols::Symbols() {
  ::dl_iterate_phdr(find_base, &base_);
  const int fd = ::open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  struct stat file {};
  if (::fstat(fd, &file) == 0 && file.st_size > 0) {
    void* image = ::mmap(nullptr, static_cast<std::size_t>(file.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
    if (image != MAP_FAILED) {
      image_ = image;
      size_ = static_cast<std::size_t>(file.st_size);
    }
  }
  ::close(fd);
  if (image_) read(reinterpret_cast<std::uintptr_t>(image_), size_);
}

Symbols::~Symbols() {
  if (image_) ::munmap(image_, size_);
}

// ELF: the kernel has loaded this file, so that its headers are well-formed; a table that isn't within it is left alone.
void Symbols::read(std::uintptr_t image, std::size_t size) {
  using Header = ElfW(Ehdr);
  using Section = ElfW(Shdr);
  using Entry = ElfW(Sym);
  const auto within = [size](std::uint64_t offset, std::uint64_t length) { return offset <= size && length <= size - offset; };
  const auto* header = reinterpret_cast<const Header*>(image);
  if (!within(0, sizeof *header) || !within(header->e_shoff, std::uint64_t{header->e_shnum} * sizeof(Section))) return;
  const auto* sections = reinterpret_cast<const Section*>(image + header->e_shoff);
  for (unsigned i = 0; i < header->e_shnum; ++i) {
    const Section& table = sections[i];
    if (table.sh_type != SHT_SYMTAB || table.sh_link >= header->e_shnum || !within(table.sh_offset, table.sh_size)) continue;
    const Section& names = sections[table.sh_link];
    if (!within(names.sh_offset, names.sh_size) || names.sh_size == 0) continue;
    const auto* entries = reinterpret_cast<const Entry*>(image + table.sh_offset);
    for (std::size_t n = 0; n < table.sh_size / sizeof(Entry); ++n) {
      const Entry& entry = entries[n];
      if (ELF64_ST_TYPE(entry.st_info) != STT_FUNC || entry.st_size == 0 || entry.st_name >= names.sh_size) continue;
      symbols_.push_back(
          {entry.st_value, entry.st_value + entry.st_size, reinterpret_cast<const char*>(image + names.sh_offset + entry.st_name)});
    }
  }
  std::sort(symbols_.begin(), symbols_.end(), [](const Symbol& a, const Symbol& b) { return a.begin < b.begin; });
}

const std::string& Symbols::name(const void* address) {
  const auto it = names_.find(address);
  if (it != names_.end()) return it->second;
  return names_.emplace(address, find(reinterpret_cast<std::uintptr_t>(address))).first->second;
}

std::string Symbols::find(std::uintptr_t address) const {
  const std::uintptr_t own = address - base_;
  const auto after = std::upper_bound(symbols_.begin(), symbols_.end(), own, [](std::uintptr_t a, const Symbol& s) { return a < s.begin; });
  if (after != symbols_.begin() && own < std::prev(after)->end) return demangled(std::prev(after)->name);
  Dl_info found{};
  void* extra = nullptr;
  if (::dladdr1(reinterpret_cast<void*>(address), &found, &extra, RTLD_DL_SYMENT) == 0 || !found.dli_fname) return "[unknown]";
  const auto* symbol = static_cast<const ElfW(Sym)*>(extra);
  // The nearest exported name before an address may be that of quite another function.
  if (found.dli_sname && symbol && address < reinterpret_cast<std::uintptr_t>(found.dli_saddr) + symbol->st_size)
    return demangled(found.dli_sname);
  const char* slash = std::strrchr(found.dli_fname, '/');
  return std::string("[").append(slash ? slash + 1 : found.dli_fname).append("]");
}

}  // namespace pgsidecar::proxy
