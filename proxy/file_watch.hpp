// The files that a configuration is made of: which of them have changed and, if asked for, when one does (inotify; nothing is polled).
// Directories are watched, since files are replaced by renaming, and Kubernetes swaps a symbolic link above them. On the control loop.
#pragma once

#include <sys/stat.h>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>

namespace pgsidecar::proxy {

/// The directories in which something happens when what this path leads to is replaced: its own and those of each symbolic link on the way.
std::set<std::string> directories_of(const std::string& file);

class FileWatch {
 public:
  /// `happened` is called when one of the files may have changed.
  FileWatch(boost::asio::io_context& control, std::function<void()> happened);

  /// What to know of from now on. Those that were known keep what was last seen of them.
  void set(const std::set<std::string>& files, bool watch);
  /// Those that are others since this, or set(), was last called.
  std::set<std::string> changed();
  bool unchanged() const;  ///< there are none

 private:
  /// What tells a file from the one that replaces it.
  struct Stamp {
    dev_t device = 0;
    ino_t inode = 0;
    off_t size = 0;
    std::int64_t modified = 0;  ///< nanoseconds
    friend bool operator==(const Stamp&, const Stamp&) = default;
  };
  static Stamp stamp_of(const std::string& file);
  void watch(const std::set<std::string>& files);
  void wait();

  boost::asio::io_context& control_;
  std::function<void()> happened_;
  std::map<std::string, Stamp> files_;
  std::optional<boost::asio::posix::stream_descriptor> events_;
  boost::asio::steady_timer settle_;
  bool settling_ = false;
  std::array<char, 4096> buffer_;
};

}  // namespace pgsidecar::proxy
