// Server-sent events for the page: what is published goes to all readers. Decides how many there may be and when one is too slow;
// server.cpp publishes a sample a second, and only while somebody reads. Lives on the control loop.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <string_view>

namespace pgsidecar::admin {

class Stream {
 public:
  static constexpr std::size_t kReaders = 8;
  /// A reader that doesn't take a sample within this time is dropped; those published meanwhile it never sees.
  static constexpr std::chrono::seconds kWriteTime{5};

  explicit Stream(boost::asio::io_context& control) : control_(control) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  bool empty() const { return readers_.empty(); }
  bool full() const { return readers_.size() >= kReaders; }

  /// Answers a GET on `peer` with the latest sample and those to come, until it leaves, is dropped, or stop().
  boost::asio::awaitable<void> serve(boost::beast::tcp_stream& peer);
  /// `data` is one line.
  void publish(std::string_view event, std::string_view data);
  /// Ends all readers at once; none is served any more.
  void stop();

 private:
  struct Reader {
    boost::beast::tcp_stream& peer;
    boost::asio::steady_timer wake;
  };

  boost::asio::io_context& control_;
  std::list<Reader> readers_;
  std::shared_ptr<const std::string> latest_;
  std::uint64_t number_ = 0;  // of the latest sample
  bool stopped_ = false;
};

}  // namespace pgsidecar::admin
