#include "proxy/notify.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace pgsidecar::proxy {

namespace {

std::uint64_t number(const std::string& text) {
  std::uint64_t n = 0;
  std::from_chars(text.data(), text.data() + text.size(), n);
  return n;
}

}  // namespace

Notifier::Notifier(boost::asio::io_context& control, const conf::Environment& env)
    : timer_(control), address_(env("NOTIFY_SOCKET").value_or("")) {
  if (address_.size() >= sizeof(sockaddr_un::sun_path) || (!address_.starts_with('/') && !address_.starts_with('@'))) address_.clear();
  if (address_.starts_with('@')) address_[0] = '\0';
  const std::string whose = env("WATCHDOG_PID").value_or("");
  if (whose.empty() || whose == std::to_string(::getpid()))
    period_ = std::chrono::microseconds(number(env("WATCHDOG_USEC").value_or("")) / 2);
}

void Notifier::send(const std::string& message) {
  if (!speaks_ || address_.empty()) return;
  const int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  std::copy(address_.begin(), address_.end(), to.sun_path);
  // Not waited for: who doesn't read must not stop the loop. The next one comes.
  ::sendto(fd, message.data(), message.size(), MSG_NOSIGNAL | MSG_DONTWAIT, reinterpret_cast<const sockaddr*>(&to),
           static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address_.size()));
  ::close(fd);
}

void Notifier::begin(std::function<void(std::function<void()> alive)> ask) {
  if (std::exchange(speaks_, true)) return;
  ask_ = std::move(ask);
  ready();
  if (!status_.empty()) send("STATUS=" + status_);
  if (period_.count() > 0 && !address_.empty()) watch();
}

void Notifier::ready() {
  if (!stopping_) send("READY=1");
}

void Notifier::reloading() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  if (!stopping_) send("RELOADING=1\nMONOTONIC_USEC=" + std::to_string(now.tv_sec * 1000000 + now.tv_nsec / 1000));
}

void Notifier::stopping() {
  if (!std::exchange(stopping_, true)) send("STOPPING=1");
}

void Notifier::status(const std::string& line) {
  if (std::exchange(status_, line) != line) send("STATUS=" + line);
}

void Notifier::hand_over(int pid) {
  send("MAINPID=" + std::to_string(pid) + "\nREADY=1");
  end();
}

void Notifier::end() {
  speaks_ = false;
  timer_.cancel();
}

void Notifier::watch() {
  timer_.expires_after(period_);
  timer_.async_wait([this](const boost::system::error_code& ec) {
    if (ec) return;
    ask_([this] { send("WATCHDOG=1"); });
    watch();
  });
}

}  // namespace pgsidecar::proxy
