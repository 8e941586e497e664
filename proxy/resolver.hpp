// Host names to addresses. Each name is looked up in a thread of its own, since getaddrinfo can't be stopped: a name server that is
// silent holds up neither another name nor the end of the process.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace pgsidecar::proxy {

class Resolver {
 public:
  using Endpoints = std::vector<boost::asio::ip::tcp::endpoint>;
  using Found = std::function<void(const boost::system::error_code& error, const Endpoints& found)>;

  explicit Resolver(boost::asio::io_context& loop);
  ~Resolver();

  /// Called on the loop; `found` is called there too, at once for an address.
  void find(const std::string& name, std::uint16_t port, Found found);

 private:
  using Name = std::pair<std::string, std::uint16_t>;
  struct Loop;
  void begin();
  void finish(const Name& name, const boost::system::error_code& error, const Endpoints& found);

  std::shared_ptr<Loop> loop_;
  std::map<Name, std::vector<Found>> asked_;
  std::deque<Name> queue_;  // not begun yet
  std::size_t running_ = 0;
};

}  // namespace pgsidecar::proxy
