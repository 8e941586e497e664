#include "proxy/resolver.hpp"

#include <boost/asio/post.hpp>
#include <mutex>
#include <system_error>
#include <thread>

namespace pgsidecar::proxy {

namespace asio = boost::asio;

namespace {
constexpr std::size_t kMostThreads = 8;
}

struct Resolver::Loop {
  std::mutex mutex;
  asio::io_context* context;  // null: the resolver is gone
};

Resolver::Resolver(asio::io_context& loop) : loop_(std::make_shared<Loop>()) {
  loop_->context = &loop;
}

Resolver::~Resolver() {
  const std::lock_guard lock(loop_->mutex);
  loop_->context = nullptr;
}

void Resolver::find(const std::string& name, std::uint16_t port, Found found) {
  boost::system::error_code ec;
  if (const auto address = asio::ip::make_address(name, ec); !ec) return found({}, {{address, port}});
  auto& who = asked_[{name, port}];
  who.push_back(std::move(found));
  if (who.size() > 1) return;
  queue_.emplace_back(name, port);
  begin();
}

void Resolver::begin() {
  while (!queue_.empty() && running_ < kMostThreads) {
    ++running_;
    const Name name = queue_.front();
    queue_.pop_front();
    const auto look_up = [this, loop = loop_, name] {
      boost::system::error_code error;
      asio::io_context own;
      Endpoints found;
      for (const auto& entry : asio::ip::tcp::resolver(own).resolve(name.first, std::to_string(name.second), error))
        found.push_back(entry.endpoint());
      const std::lock_guard lock(loop->mutex);
      if (loop->context) asio::post(*loop->context, [this, name, error, found = std::move(found)] { finish(name, error, found); });
    };
    try {
      std::thread(look_up).detach();
    } catch (const std::system_error& e) {
      asio::post(*loop_->context, [this, name, error = boost::system::error_code(e.code())] { finish(name, error, {}); });
    }
  }
}

void Resolver::finish(const Name& name, const boost::system::error_code& error, const Endpoints& found) {
  --running_;
  const auto who = asked_.extract(name);
  begin();
  for (const Found& one : who.mapped()) one(error, found);
}

}  // namespace pgsidecar::proxy
