#include "proxy/control.hpp"

#include <sys/un.h>

#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <filesystem>
#include <utility>

namespace pgsidecar::proxy {

namespace asio = boost::asio;

namespace {
constexpr std::size_t kMostContexts = 64;
constexpr std::chrono::seconds kPatience{1};
constexpr std::size_t kLongestSocketPath = sizeof(sockaddr_un::sun_path) - 1;
}  // namespace

struct Control::Lookup {
  Upstream upstream;
  PasswordCommands::Command command;  // no program: the passwords are known
  Done done;
  std::size_t next_host = 0;
};

void Control::resolve(conf::Upstream upstream, Done done) {
  asio::post(control_, [this, upstream = std::move(upstream), done = std::move(done)]() mutable {
    auto lookup = std::make_shared<Lookup>();
    lookup->done = std::move(done);
    try {
      lookup->upstream.params = conf::resolve_upstream(upstream, env_);
      lookup->command.argv = conf::expand_arguments(upstream.passwordCommand, env_);
      lookup->command.timeout = std::chrono::milliseconds(upstream.passwordCommandTimeoutMillis);
      lookup->command.cache = std::chrono::seconds(upstream.passwordCacheSeconds);
      if (lookup->upstream.params.sslmode != conf::SslMode::Disable) lookup->upstream.tls = context(lookup->upstream.params);
    } catch (const std::exception& e) {
      lookup->upstream.error = e.what();
      return finish(std::move(lookup));
    }
    look_up_next(std::move(lookup));
  });
}

void Control::derive(protocol::ScramDerivation from, std::function<void(const protocol::ScramKeys&)> done) {
  if (!deriver_) deriver_.emplace(1);
  asio::post(*deriver_, [this, from = std::move(from), done = std::move(done)]() mutable {
    asio::post(data_, [keys = protocol::derive_keys(from), done = std::move(done)] { done(keys); });
  });
}

void Control::look_up_next(std::shared_ptr<Lookup> lookup) {
  Upstream& upstream = lookup->upstream;
  if (lookup->next_host == upstream.params.hosts.size()) {
    if (!upstream.targets.empty()) upstream.error.clear();
    return finish(std::move(lookup));
  }
  const conf::Host& host = upstream.params.hosts[lookup->next_host++];
  if (lookup->command.argv.empty()) return look_up_addresses(std::move(lookup), {{}, host, {}});
  ask_password(std::move(lookup), host);
}

void Control::ask_password(std::shared_ptr<Lookup> lookup, conf::Host host) {
  PasswordCommands::Command& command = lookup->command;
  command.host = host.name;
  command.port = host.port;
  command.user = lookup->upstream.params.user;
  const auto begun = PasswordCommands::Clock::now();
  passwords_.get(command, [this, lookup, begun, host = std::move(host)](const PasswordCommands::Answer& answer) mutable {
    lookup->upstream.passwords_took += PasswordCommands::Clock::now() - begun;
    if (!answer.error.empty()) {
      lookup->upstream = {};
      lookup->upstream.error = answer.error;
      return finish(std::move(lookup));
    }
    host.password = answer.password;
    look_up_addresses(std::move(lookup), {{}, std::move(host), answer.since});
  });
}

void Control::look_up_addresses(std::shared_ptr<Lookup> lookup, Target target) {
  const conf::Host& host = target.host;
  if (host.is_unix()) {
    std::string path = host.name + "/.s.PGSQL." + std::to_string(host.port);
    if (path[0] == '@') path[0] = '\0';
    if (path.size() > kLongestSocketPath) {
      lookup->upstream.error = "Unix-domain socket path \"" + path + "\" is too long (maximum 107 bytes)";
    } else {
      target.endpoint = asio::local::stream_protocol::endpoint(path);
      lookup->upstream.targets.push_back(std::move(target));
    }
    return look_up_next(std::move(lookup));
  }
  const std::string name = host.address.empty() ? host.name : host.address;
  const std::uint16_t port = host.port;
  // Who has an address to try already doesn't wait for a name server that is silent.
  auto patience = std::make_shared<asio::steady_timer>(control_);
  auto answered = std::make_shared<bool>(false);
  const Resolver::Found on_answer = [this, lookup, patience, answered, target = std::move(target)](
                                        const boost::system::error_code& ec, const Resolver::Endpoints& found) mutable {
    if (std::exchange(*answered, true)) return;
    patience->cancel();
    if (ec) lookup->upstream.error = "could not translate host name \"" + target.host.name + "\" to address: " + ec.message();
    for (const auto& endpoint : found) {
      target.endpoint = endpoint;
      lookup->upstream.targets.push_back(target);
    }
    look_up_next(lookup);
  };
  if (!lookup->upstream.targets.empty()) {
    patience->expires_after(kPatience);
    patience->async_wait([on_answer](const boost::system::error_code& stopped) {
      if (!stopped) on_answer(asio::error::timed_out, {});
    });
  }
  resolver_.find(name, port, on_answer);
}

void Control::forget_password(std::string password) {
  asio::post(control_, [this, password = std::move(password)] { passwords_.forget(password); });
}

void Control::forget_passwords() {
  asio::post(control_, [this] { passwords_.forget_all(); });
}

void Control::finish(std::shared_ptr<Lookup> lookup) {
  asio::post(data_, [lookup = std::move(lookup)] { lookup->done(std::make_shared<const Upstream>(std::move(lookup->upstream))); });
}

std::shared_ptr<SSL_CTX> Control::context(const conf::ConnectParams& p) {
  // A replaced certificate or CA file is a different context.
  std::string key = std::to_string(static_cast<int>(p.sslmode)) + '\n' + std::to_string(static_cast<int>(p.sslnegotiation)) + '\n' +
                    p.sslMinProtocolVersion + '\n' + p.sslMaxProtocolVersion + '\n' + p.sslpassword;
  for (const conf::Host& host : p.hosts) key += '\n' + host.name;  // a resumed session isn't verified again
  const auto of_system = [this](const char* variable, const char* usual) { return env_(variable).value_or(usual); };
  for (const std::string& file : {p.sslrootcert, p.sslcert, p.sslkey, p.sslcrl, p.sslcrldir,
                                  of_system(X509_get_default_cert_file_env(), X509_get_default_cert_file()),
                                  of_system(X509_get_default_cert_dir_env(), X509_get_default_cert_dir())}) {
    std::error_code ec;
    const auto changed = std::filesystem::last_write_time(file, ec);
    key += '\n' + file + '\n' + (ec ? "" : std::to_string(changed.time_since_epoch().count()));
  }
  if (contexts_.size() >= kMostContexts && !contexts_.contains(key)) contexts_.clear();  // files were rotated
  auto& context = contexts_[key];
  if (!context) context = std::shared_ptr<SSL_CTX>(make_client_context(p).release(), SSL_CTX_free);
  return context;
}

}  // namespace pgsidecar::proxy
