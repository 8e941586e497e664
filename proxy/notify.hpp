// What systemd is told (sd_notify(3), Type=notify): ready, reloading, stopping, a line of status, who the main process is, and that both
// loops are alive. Silent without NOTIFY_SOCKET. Lives on the control loop.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <string>

#include "conf/url.hpp"

namespace pgsidecar::proxy {

class Notifier {
 public:
  Notifier(boost::asio::io_context& control, const conf::Environment& env);

  /// From now on this is the main process. `ask` has the data loop answer, as long as it does.
  void begin(std::function<void(std::function<void()> alive)> ask);
  void ready();
  void reloading();
  void stopping();
  void status(const std::string& line);
  /// Another process is the main one from now on; this one says nothing more.
  void hand_over(int pid);
  void end();

 private:
  void send(const std::string& message);
  void watch();

  boost::asio::steady_timer timer_;
  std::string address_;                  // as sockaddr_un has it; empty: nobody listens
  std::chrono::microseconds period_{0};  // of the watchdog; 0: there is none
  std::function<void(std::function<void()> alive)> ask_;
  std::string status_;
  bool speaks_ = false, stopping_ = false;
};

}  // namespace pgsidecar::proxy
