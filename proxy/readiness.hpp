// Waits until a socket is readable, without the system call that Asio's async_wait makes for it. Asio registers every descriptor
// edge-triggered: async_wait makes the kernel tell of what is there already by an epoll_ctl each time, which isn't needed after a read
// that left nothing. No public call of Asio says so; Asio remembers an edge that comes while nobody waits, though, for operations that
// say of themselves that they are "done and exhausted". This is such an operation, of which the performing is left to the handler.
// Written for the version of Asio named below; with any other it is async_wait.
#pragma once

#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/recycling_allocator.hpp>
#include <boost/asio/version.hpp>
#include <memory>
#include <utility>

namespace pgsidecar::proxy {

using Socket = boost::asio::basic_stream_socket<boost::asio::generic::stream_protocol, boost::asio::io_context::executor_type>;

#if BOOST_ASIO_VERSION == 102600 && defined(BOOST_ASIO_HAS_EPOLL)

namespace detail {

template <class Handler>
class ReadinessOp : public boost::asio::detail::reactor_op {
  using Base = boost::asio::detail::reactor_op;
  using Allocator = boost::asio::recycling_allocator<ReadinessOp>;

 public:
  static ReadinessOp* make(Handler&& handler) { return std::construct_at(Allocator().allocate(1), std::move(handler)); }
  explicit ReadinessOp(Handler&& handler) : Base({}, &ReadinessOp::perform, &ReadinessOp::complete), handler_(std::move(handler)) {}

 private:
  static Base::status perform(Base*) { return done_and_exhausted; }
  static void complete(void* owner, boost::asio::detail::operation* base, const boost::system::error_code&, std::size_t) {
    auto* op = static_cast<ReadinessOp*>(base);
    Handler handler(std::move(op->handler_));
    const boost::system::error_code ec = op->ec_;
    std::destroy_at(op);
    Allocator().deallocate(op, 1);  // before the handler, which waits again
    if (owner) handler(ec);
  }

  Handler handler_;
};

// Both are protected; what is taken is a pointer to the base's own member.
struct SocketParts : Socket {
  static constexpr auto impl = &SocketParts::impl_;
};
struct ServiceParts : boost::asio::detail::reactive_socket_service_base {
  static constexpr auto start = &ServiceParts::start_op;
};

}  // namespace detail

/// Calls the handler with an error_code when there is something to read, the end of the stream and an error included. `drained`: the
/// last read left nothing, so that only what comes from now on, or came since that read, has to be told of.
template <class Handler>
void wait_until_readable(Socket& socket, bool drained, Handler handler) {
  auto& impl = socket.*detail::SocketParts::impl;
  (impl.get_service().*detail::ServiceParts::start)(impl.get_implementation(), boost::asio::detail::reactor::read_op,
                                                    detail::ReadinessOp<Handler>::make(std::move(handler)), false, drained, false);
}

#else

template <class Handler>
void wait_until_readable(Socket& socket, bool /*drained*/, Handler handler) {
  socket.async_wait(Socket::wait_read, std::move(handler));
}

#endif

}  // namespace pgsidecar::proxy
