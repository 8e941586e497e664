// What only the server's own login tells, asked by one. Part of Worker.
#include <boost/asio/post.hpp>
#include <utility>

#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;

namespace {

/// So long a password that the server has accepted counts without its being asked again.
constexpr std::chrono::seconds kAccepted{10};

/// The pool's connections are made with this login's password: its failure is theirs.
bool is_pools_own(const PoolEntry& entry, const ServerConnection::Login& login) {
  return login.password.empty() || login.password == entry.given_password;
}

}  // namespace

void Worker::verify(ClientSession& client, const std::string& password, const std::vector<std::string>& date_styles) {
  PoolEntry& entry = *client.entry();
  ServerConnection::Login login{client.weak_from_this(), password, date_styles, now()};
  if (is_known(entry, login) && (password.empty() || now() - entry.given_at < kAccepted)) return client.verified();
  entry.logins.push_back(std::move(login));
  kick();
  serve(entry);
}

bool Worker::is_known(const PoolEntry& entry, const ServerConnection::Login& login) {
  return is_pools_own(entry, login) && (login.date_styles.empty() || entry.settings.date_style(login.date_styles));
}

void Worker::serve_logins(PoolEntry& entry) {
  std::deque<ServerConnection::Login> waiting = std::exchange(entry.logins, {});
  for (ServerConnection::Login& login : waiting)
    if (!login.client.expired() && !serve_login(entry, login)) entry.logins.push_back(std::move(login));
}

// False: it waits.
bool Worker::serve_login(PoolEntry& entry, const ServerConnection::Login& login) {
  const auto tell = [&](void (*what)(ClientSession&, const protocol::ErrorFields&)) {
    asio::post(data_, [this, what, client = login.client, failure = entry.last_failure] {
      const Turn turn(*this);
      if (const auto session = client.lock()) what(*session, failure);
    });
    return true;
  };
  const auto accept = [](ClientSession& client, const protocol::ErrorFields& /*none*/) { client.verified(); };
  const auto asks_date_style = [](const auto& one) {
    const ServerConnection& server = *one.second;
    return server.state() == ServerConnection::State::Connecting && server.login() && !server.login()->date_styles.empty();
  };
  const bool known = is_known(entry, login);
  if (known && login.password.empty()) return tell(accept);
  if (!login.date_styles.empty() && std::any_of(entry.servers.begin(), entry.servers.end(), asks_date_style)) return false;
  // A password that the server has refused to let in is judged anew.
  const bool is_judged = !login.password.empty() && is_permanent(entry.last_failure.sqlstate);
  if (is_pools_own(entry, login) && !is_judged && !entry.backoff.may_try(now(), true))
    return is_refused(entry, now()) && tell([](ClientSession& client, const protocol::ErrorFields& failure) { client.refused(failure); });
  // Until the server has accepted a password, who waits is served by nothing but a login.
  const bool serves_all = entry.lacks_password();
  const bool is_next = serves_all || login.since <= entry.pool.oldest_wait();
  const std::uint32_t before_it = is_next ? 0 : entry.pool.wanted(connecting_for_all(entry));
  if (before_it < entry.pool.room()) {
    open_server(entry, login);
    return true;
  }
  if (entry.pool.staying() + entry.pool.stuck() < entry.pool.open()) return false;  // a place is about to be free
  if (known && !entry.pool.any_idle()) return tell(accept);                         // all are in use: it can't be asked again
  if (is_next) make_room(entry);
  return false;
}

std::uint32_t Worker::connecting_for_all(const PoolEntry& entry) const {
  if (entry.connecting == 0) return 0;
  const auto is_logins = [&](const auto& one) {
    const ServerConnection& server = *one.second;
    const auto& login = server.login();
    return server.state() == ServerConnection::State::Connecting && login && (!login->date_styles.empty() || !is_pools_own(entry, *login));
  };
  return entry.connecting - static_cast<std::uint32_t>(std::count_if(entry.servers.begin(), entry.servers.end(), is_logins));
}

void Worker::make_room(PoolEntry& entry) {
  if (pool::Slot* idle = entry.pool.any_idle()) static_cast<ServerConnection*>(idle)->close(pool::CloseReason::Login);
}

bool Worker::login_failed(PoolEntry& entry, ServerConnection::Login login, const protocol::ErrorFields& error) {
  const bool own = is_pools_own(entry, login);
  if (own && (!is_answer(error.sqlstate) || error.sqlstate == "53300")) {  // the server can't be asked at the moment
    if (error.sqlstate == "53300") make_room(entry);                       // the server is full, maybe of the pool's own
    entry.logins.push_front(std::move(login));
    return false;
  }
  if (const auto client = login.client.lock()) client->refused(error);
  const bool its_value = !login.date_styles.empty() && error.sqlstate.starts_with("22");  // others have other ones
  return !own || its_value || !is_permanent(error.sqlstate);
}

}  // namespace pgsidecar::proxy
