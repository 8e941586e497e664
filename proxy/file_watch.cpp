#include "proxy/file_watch.hpp"

#include <sys/inotify.h>

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "proxy/log.hpp"

namespace pgsidecar::proxy {

namespace fs = std::filesystem;

namespace {

constexpr std::uint32_t kEvents = IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_DELETE;
constexpr std::chrono::milliseconds kSettle{100};  // in which what belongs together, a certificate and its key, is replaced
constexpr int kMostLinks = 40;                     // as Linux follows

}  // namespace

std::set<std::string> directories_of(const std::string& file) {
  std::set<std::string> found;
  std::error_code ec;
  std::vector<fs::path> left{fs::absolute(file, ec)};
  for (int links = 0; !left.empty() && links < kMostLinks; ++links) {
    const fs::path path = std::move(left.back());
    left.pop_back();
    found.insert(path.parent_path());
    if (fs::is_directory(path, ec)) found.insert(path);  // of what is in it
    fs::path above;
    for (const fs::path& part : path) {
      const fs::path here = above / part;
      const fs::path target = fs::read_symlink(here, ec);
      if (!ec) {
        found.insert(above);
        left.push_back(above / target);  // an absolute one stands for itself
      }
      above = here;
    }
  }
  return found;
}

FileWatch::FileWatch(boost::asio::io_context& control, std::function<void()> happened)
    : control_(control), happened_(std::move(happened)), settle_(control) {}

FileWatch::Stamp FileWatch::stamp_of(const std::string& file) {
  struct stat info {};
  if (::stat(file.c_str(), &info) != 0) return {};
  return {info.st_dev, info.st_ino, info.st_size, std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

void FileWatch::set(const std::set<std::string>& files, bool watched) {
  std::erase_if(files_, [&](const auto& one) { return !files.contains(one.first); });
  for (const std::string& file : files)
    if (!files_.contains(file)) files_.emplace(file, stamp_of(file));
  if (watched)
    watch(files);
  else
    events_.reset();
}

std::set<std::string> FileWatch::changed() {
  std::set<std::string> others;
  for (auto& [file, stamp] : files_)
    if (const Stamp now = stamp_of(file); now != stamp) {
      stamp = now;
      others.insert(file);
    }
  return others;
}

bool FileWatch::unchanged() const {
  return std::all_of(files_.begin(), files_.end(), [](const auto& one) { return stamp_of(one.first) == one.second; });
}

// What is watched already stays, so that nothing is missed meanwhile.
void FileWatch::watch(const std::set<std::string>& files) {
  const bool anew = !events_;
  if (anew) {
    const int fd = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (fd < 0) return log::error("watch_failed", {}, "cannot watch the configuration's files: {}", std::strerror(errno));
    events_.emplace(control_, fd);
  }
  std::set<std::string> directories;
  for (const std::string& file : files) directories.merge(directories_of(file));
  for (const std::string& directory : directories)
    if (::inotify_add_watch(events_->native_handle(), directory.c_str(), kEvents) < 0)
      log::warn("watch_failed", {}, "cannot watch \"{}\" (watchConfig): {}", directory, std::strerror(errno));
  if (anew) wait();
}

void FileWatch::wait() {
  events_->async_read_some(boost::asio::buffer(buffer_), [this](const boost::system::error_code& ec, std::size_t) {
    if (ec || !events_) return;
    if (!std::exchange(settling_, true)) {
      settle_.expires_after(kSettle);
      settle_.async_wait([this](const boost::system::error_code&) {
        settling_ = false;
        if (events_) happened_();
      });
    }
    wait();
  });
}

}  // namespace pgsidecar::proxy
