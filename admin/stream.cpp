#include "admin/stream.hpp"

#include <boost/asio/buffer.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>

namespace pgsidecar::admin {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

// Ends with the connection, so that it needs no length; `retry` is how soon a browser is back after a loss.
constexpr std::string_view kHead =
    "HTTP/1.1 200 OK\r\n"
    "Content-Type: text/event-stream\r\n"
    "Cache-Control: no-store\r\n"
    "X-Content-Type-Options: nosniff\r\n"
    "Server: pgsidecar\r\n"
    "Connection: close\r\n"
    "\r\n"
    "retry: 1000\n\n";

}  // namespace

asio::awaitable<void> Stream::serve(boost::beast::tcp_stream& peer) {
  if (stopped_ || full()) co_return;
  const auto reader = readers_.insert(readers_.end(), Reader{peer, asio::steady_timer(control_)});
  struct Leave {
    Stream& stream;
    std::list<Reader>::iterator reader;
    ~Leave() {
      stream.readers_.erase(reader);
      if (stream.readers_.empty()) stream.latest_.reset();  // too old for who comes next
    }
  };
  const Leave leave{*this, reader};
  error_code ec;
  const auto head = asio::buffer(kHead);
  peer.expires_after(kWriteTime);
  co_await asio::async_write(peer, head, asio::redirect_error(asio::use_awaitable, ec));
  std::uint64_t seen = 0;
  while (!ec && !stopped_) {
    if (!latest_ || seen == number_) {
      reader->wake.expires_at(asio::steady_timer::time_point::max());
      error_code woken;
      co_await reader->wake.async_wait(asio::redirect_error(asio::use_awaitable, woken));
      continue;
    }
    seen = number_;
    const auto sample = latest_;
    const auto bytes = asio::buffer(*sample);
    peer.expires_after(kWriteTime);
    co_await asio::async_write(peer, bytes, asio::redirect_error(asio::use_awaitable, ec));
  }
}

void Stream::publish(std::string_view event, std::string_view data) {
  std::string text;
  text.append("event: ").append(event).append("\ndata: ").append(data).append("\n\n");
  latest_ = std::make_shared<const std::string>(std::move(text));
  ++number_;
  for (auto& reader : readers_) reader.wake.cancel();
}

void Stream::stop() {
  stopped_ = true;
  for (auto& reader : readers_) {
    reader.wake.cancel();
    reader.peer.close();
  }
}

}  // namespace pgsidecar::admin
