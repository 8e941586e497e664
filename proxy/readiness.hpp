// Waits until a socket is readable, without the system call that Asio's async_wait makes for it. Asio registers every descriptor
// edge-triggered: async_wait makes the kernel tell of what is there already by an epoll_ctl each time, which isn't needed after a read
// that left nothing. No public call of Asio says so; Asio remembers an edge that comes while nobody waits, though, for operations that
// say of themselves that they are "done and exhausted". This is such an operation, of which the performing is left to the session that
// it is a member of, so that waiting takes nothing from the heap. Written for the version of Asio named below; with any other it is
// async_wait.
#pragma once

#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/version.hpp>
#include <memory>
#include <utility>

namespace pgsidecar::proxy {

using Socket = boost::asio::basic_stream_socket<boost::asio::generic::stream_protocol, boost::asio::io_context::executor_type>;

#if BOOST_ASIO_VERSION == 102600 && defined(BOOST_ASIO_HAS_EPOLL)

namespace detail {

// Both are protected; what is taken is a pointer to the base's own member.
struct SocketParts : Socket {
  static constexpr auto impl = &SocketParts::impl_;
};
struct ServiceParts : boost::asio::detail::reactive_socket_service_base {
  static constexpr auto start = &ServiceParts::start_op;
};

}  // namespace detail

/// One wait at a time. A member of its session, which lives until the wait is over.
template <class Session>
class Readiness : private boost::asio::detail::reactor_op {
  using Base = boost::asio::detail::reactor_op;

 public:
  explicit Readiness(Session& session) : Base({}, &Readiness::perform, &Readiness::complete), session_(session) {}
  bool pending() const { return keeps_ != nullptr; }
  /// Calls session.on_readiness(error_code) when there is something to read, the end of the stream and an error included. `drained`: the
  /// last read left nothing, so that only what comes from now on, or came since that read, has to be told of.
  void wait(Socket& socket, bool drained) {
    keeps_ = session_.shared_from_this();
    ec_ = {};
    auto& impl = socket.*detail::SocketParts::impl;
    (impl.get_service().*detail::ServiceParts::start)(impl.get_implementation(), boost::asio::detail::reactor::read_op, this, false,
                                                      drained, false);
  }

 private:
  static Base::status perform(Base*) { return done_and_exhausted; }
  static void complete(void* owner, boost::asio::detail::operation* base, const boost::system::error_code&, std::size_t) {
    auto* self = static_cast<Readiness*>(base);
    const auto session = std::move(self->keeps_);
    if (owner) session->on_readiness(self->ec_);
  }

  Session& session_;
  std::shared_ptr<Session> keeps_;  // while it waits
};

#else

template <class Session>
class Readiness {
 public:
  explicit Readiness(Session& session) : session_(session) {}
  bool pending() const { return pending_; }
  void wait(Socket& socket, bool /*drained*/) {
    pending_ = true;
    socket.async_wait(Socket::wait_read, [this, keeps = session_.shared_from_this()](const boost::system::error_code& ec) {
      pending_ = false;
      session_.on_readiness(ec);
    });
  }

 private:
  Session& session_;
  bool pending_ = false;
};

#endif

}  // namespace pgsidecar::proxy
