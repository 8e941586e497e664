#include "proxy/supervisor.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <csignal>
#include <initializer_list>
#include <thread>
#include <utility>

#include "proxy/console_config.hpp"
#include "proxy/log.hpp"
#include "proxy/tls.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;

namespace {

constexpr std::uint64_t kOwnFiles = 96;       // loops, ports and logs, the admin's and the consoles' connections, cancel requests
constexpr std::uint64_t kMostServers = 1024;  // that descriptors are kept for

/// As far as the configuration tells.
std::uint64_t server_connections(const conf::Config& config) {
  std::uint64_t of_a_user = config.databases.empty() ? config.pool.max : 0;
  for (const auto& [name, database] : config.databases) of_a_user += database.pool.max;
  return std::min<std::uint64_t>(of_a_user * std::max<std::size_t>(1, config.users.size()), kMostServers);
}

/// As many descriptors as clients and servers may need, if the hard limit allows. Returns how many clients' connections they are enough
/// for: without descriptors for servers and health checks those clients would be of no use.
std::size_t raise_file_limit(const conf::Config& config) {
  const std::uint64_t others = server_connections(config) + kOwnFiles;
  const std::uint64_t wanted = std::uint64_t{config.limits.maxClients} + config.limits.maxLoginClients + others;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return wanted - others;
  if (limit.rlim_cur < wanted) {
    rlimit raised = limit;
    raised.rlim_cur = std::min<rlim_t>(wanted, limit.rlim_max);
    if (::setrlimit(RLIMIT_NOFILE, &raised) == 0) limit = raised;
  }
  const std::uint64_t files = limit.rlim_cur;
  const std::uint64_t room = files - std::min(others, files / 4 * 3);
  if (room < config.limits.maxClients)
    log::warn("file_limit", {}, "limits.maxClients is {}, but the {} open files that the system allows are enough for {} clients",
              config.limits.maxClients, files, room);
  return room;
}

constexpr std::initializer_list<int> kSignals{SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2};

void mask_signals(int how) {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : kSignals) sigaddset(&set, number);
  ::pthread_sigmask(how, &set, nullptr);
}

}  // namespace

void hold_signals() {
  mask_signals(SIG_BLOCK);
}

Supervisor::Supervisor(std::string config_path, std::shared_ptr<const conf::Config> config, conf::Environment env, Program program)
    : config_path_(std::move(config_path)),
      config_(config),
      env_(env),
      control_(control_loop_, data_loop_, std::move(env)),
      worker_(data_loop_, control_, Prepared(std::move(config), env_)),
      signals_(control_loop_),
      files_(control_loop_,
             [this] {
               if (!files_.unchanged()) reload();
             }),
      program_(std::move(program)),
      notifier_(control_loop_, env_) {
  for (const int number : kSignals) signals_.add(number);
  std::signal(SIGPIPE, SIG_IGN);
  mask_signals(SIG_UNBLOCK);
  worker_.on_request = [this](const ConsoleCommand& command, std::function<void(std::string)> done) {
    asio::post(control_loop_, [this, command, done = std::move(done)]() mutable {
      asio::post(data_loop_, [error = request(command), done = std::move(done)] { done(error); });
    });
  };
}

void Supervisor::snapshot(pool::Snapshot::Detail detail, SnapshotDone done) {
  asio::post(data_loop_, [this, detail, due = pool::Clock::now(), done = std::move(done)]() mutable {
    worker_.lag.record(due, pool::Clock::now());
    auto copy = std::make_shared<pool::Snapshot>(worker_.snapshot(detail));
    asio::post(control_loop_, [this, copy = std::move(copy), due = pool::Clock::now(), done = std::move(done)] {
      control_lag_.record(due, pool::Clock::now());
      copy->controlLoop = {this_thread(), control_lag_};
      done(copy);
    });
  });
}

void Supervisor::probe(SnapshotDone done) {
  asio::post(data_loop_, [this, done = std::move(done)]() mutable {
    worker_.probe([this, done = std::move(done)] { snapshot(pool::Snapshot::Detail::None, done); });
  });
}

void Supervisor::watch(SnapshotDone done, std::function<void()> happened) {
  asio::post(data_loop_, [this, happened = std::move(happened)]() mutable {
    worker_.watch([this, happened = std::move(happened)]() mutable { asio::post(control_loop_, std::move(happened)); });
  });
  snapshot(pool::Snapshot::Detail::None, std::move(done));
}

std::string Supervisor::reload(std::vector<std::string>* lines) {
  if (successor_ != 0) return "process " + std::to_string(successor_) + " has taken over: reload that one";
  struct Told {
    explicit Told(Notifier& to) : notifier(to) { notifier.reloading(); }
    ~Told() { notifier.ready(); }
    Notifier& notifier;
  };
  const Told told(notifier_);
  changed_files_.merge(files_.changed());
  try {
    conf::Config loaded = conf::load(config_path_, env_, file_checks());
    const conf::Changes changes = conf::compare(*config_, loaded);
    conf::keep_until_restart(loaded, *config_);
    auto next = std::make_shared<const conf::Config>(std::move(loaded));
    auto prepared = std::make_shared<Prepared>(next, env_);
    files_.set(conf::files_of(*next, config_path_, env_), next->watchConfig);
    log::show_more(next->log);  // what is told of the change is shown if either level shows it
    changed_files_.erase(config_path_);
    std::vector<std::string> changed;
    for (const std::string& key : changes.applied) changed.push_back(key + " changed");
    for (const std::string& file : changed_files_) changed.push_back("the file " + file + " changed");
    for (const std::string& line : changed) log::info("reload", {}, "reload: {}", line);
    for (const std::string& key : changes.needRestart)
      log::warn("reload", {}, "reload: {}", changed.emplace_back(key + " changed, which needs a restart"));
    if (changed.empty()) log::info("reload", {}, "reload: nothing changed");
    if (lines) *lines = std::move(changed);
    changed_files_.clear();
    log::set(next->log);
    config_ = next;
    asio::post(data_loop_, [this, prepared, room = raise_file_limit(*next)] {
      worker_.reload(std::move(*prepared));
      worker_.set_room(room);
    });
    if (on_reloaded) on_reloaded();
    return {};
  } catch (const conf::ConfigError& e) {
    for (const std::string& mistake : e.mistakes()) log::error("reload_failed", {}, "reload: nothing is changed: {}", mistake);
    return e.what();
  } catch (const std::exception& e) {
    log::error("reload_failed", {}, "reload: nothing is changed: {}", e.what());
    return e.what();
  }
}

void Supervisor::command(const pool::Command& command, std::function<void(std::string error)> done) {
  asio::post(data_loop_, [this, command, done = std::move(done)]() mutable {
    worker_.operate(command, [this, done = std::move(done)](std::string error) {
      asio::post(control_loop_, [error = std::move(error), done] { done(error); });
    });
  });
}

std::string Supervisor::request(const ConsoleCommand& command) {
  using Kind = ConsoleCommand::Kind;
  if (command.kind == Kind::Reload) {
    const std::string error = reload();
    return error.empty() ? error : "RELOAD failed: " + error;
  }
  if (command.kind == Kind::Set) return set(command.name, command.value);
  if (command.stop != ConsoleCommand::Stop::WaitForClients) signalled_ = true;
  asio::post(data_loop_, [this, how = command.stop] { worker_.stop(how); });
  return {};
}

std::string Supervisor::set(const std::string& key, const std::string& value) {
  auto next = std::make_shared<conf::Config>(*config_);
  if (std::string error = apply_setting(*next, key, value); !error.empty()) return error;
  for (const std::string& changed : conf::compare(*config_, *next).applied)
    log::info("setting", {}, "set: {} changed, until the next reload", changed);
  log::set(next->log);
  config_ = next;
  asio::post(data_loop_, [this, room = raise_file_limit(*next), next = config_] {
    worker_.adjust(next);
    worker_.set_room(room);
  });
  return {};
}

void Supervisor::drain() {
  asio::post(data_loop_, [this] { worker_.drain(); });
}

void Supervisor::shut_down() {
  asio::post(data_loop_, [this] { worker_.shut_down(); });
}

// --- the online restart

void Supervisor::upgrade(UpgradeDone done) {
  if (upgrade_done_) {
    log::warn("upgrade_failed", {}, "upgrade: one is under way");
    return done("an upgrade is under way", 0);
  }
  upgrade_done_ = std::move(done);
  if (::getpid() == 1)
    return finish_upgrade("process 1 cannot be replaced, since its end is the container's: start a new container in its place", 0);
  asio::post(data_loop_, [this] {
    asio::post(control_loop_, [this, why = worker_.why_no_successor(), sockets = worker_.listening()] {
      if (!why.empty()) return finish_upgrade(why, 0);
      launch_with(sockets);
    });
  });
}

void Supervisor::launch_with(std::vector<conf::Listening> sockets) {
  if (other_sockets)
    for (const conf::Listening& one : other_sockets()) sockets.push_back(one);
  const Launched launched = launch(program_, sockets);
  if (!launched.error.empty()) return finish_upgrade(launched.error, 0);
  starting_ = launched.pid;
  log::info("upgrade_started", {}, "upgrade: {} is started as process {}, to take over", program_.path, launched.pid);
  asio::post(data_loop_, [this, launched] {
    worker_.succeed(launched.link, launched.pid, [this, pid = launched.pid](const std::string& error) {
      asio::post(control_loop_, [this, pid, error] { finish_upgrade(error, pid); });
    });
  });
}

void Supervisor::finish_upgrade(const std::string& error, int pid) {
  const UpgradeDone done = std::exchange(upgrade_done_, nullptr);
  starting_ = 0;
  if (error.empty()) {
    successor_ = pid;
    notifier_.hand_over(pid);
    if (stopping_) std::exchange(stopping_, nullptr)();
  } else {
    log::error("upgrade_failed", {}, "upgrade: nothing has changed: {}", error);
  }
  done(error, pid);
  if (!error.empty()) return;
  // Behind the answer to who has asked for it.
  asio::post(control_loop_, [this] { asio::post(data_loop_, [this] { worker_.handed_over(); }); });
}

void Supervisor::become_main() {
  notifier_.begin([this](std::function<void()> alive) {
    asio::post(data_loop_, [this, alive = std::move(alive)]() mutable { asio::post(control_loop_, std::move(alive)); });
  });
}

void Supervisor::wait_signal() {
  signals_.async_wait([this](const boost::system::error_code& ec, int number) {
    if (ec) return;
    if (number == SIGHUP) {
      reload();
    } else if (number == SIGUSR2) {
      upgrade([](const std::string&, int) {});
    } else if (number == SIGUSR1) {
      log::warn("signal_ignored", {}, "SIGUSR1 does nothing: PAUSE and RESUME are commands of the console");  // PgBouncer's PAUSE
    } else if (signalled_ || number == SIGQUIT) {
      log::warn("second_signal", {}, "{}: ending at once", number == SIGQUIT ? "SIGQUIT" : "second signal");
      if (starting_ > 0) ::kill(starting_, SIGKILL);  // else it would take over
      log::stop(3);
      std::_Exit(3);
    } else {
      signalled_ = true;
      shut_down();
    }
    wait_signal();
  });
}

void Supervisor::listen(conf::PassedSockets& passed, std::function<void()> listening) {
  worker_.listen(passed);
  const int link = passed.take_link();
  const conf::PassedSockets not_wanted(std::move(passed));
  if (link < 0) {
    worker_.begin();
    listening();
    return become_main();
  }
  worker_.on_taken_over = [this, listening = std::move(listening)] { asio::post(control_loop_, listening); };
  worker_.on_alone = [this] { asio::post(control_loop_, [this] { become_main(); }); };
  worker_.take_place(link, [this](std::function<void()> then) {
    asio::post(control_loop_, [this, then = std::move(then)]() mutable { asio::post(data_loop_, std::move(then)); });
  });
}

int Supervisor::run(conf::PassedSockets& passed, std::function<void()> listening, std::function<void()> stopping) {
  worker_.set_room(raise_file_limit(*config_));
  stopping_ = std::move(stopping);
  worker_.on_draining = [this] { asio::post(control_loop_, [this] { notifier_.stopping(); }); };
  worker_.on_stopped = [this](int code) {
    exit_code_ = code;
    data_loop_.stop();
  };
  files_.set(conf::files_of(*config_, config_path_, env_), config_->watchConfig);
  listen(passed, std::move(listening));
  wait_signal();
  auto control_guard = asio::make_work_guard(control_loop_);
  stacks_.add(0, "data");
  std::thread control([this] {
    stacks_.add(1, "control");
    for (;;) {
      try {
        control_loop_.run();
        control_loop_.restart();
        control_loop_.poll();  // who has asked for what ended it gets the answer
        return;
      } catch (const std::exception& e) {
        log::error("loop_failed", {}, "control loop: {}", e.what());
      }
    }
  });
  auto data_guard = asio::make_work_guard(data_loop_);
  try {
    data_loop_.run();
  } catch (const std::exception& e) {
    log::error("loop_failed", {}, "data loop: {}", e.what());
    exit_code_ = 1;
  }
  asio::post(control_loop_, [this] {
    if (stopping_) stopping_();
    notifier_.end();
    boost::system::error_code ignored;
    signals_.clear(ignored);
    // It has ended in order: what comes in the last moment doesn't change the exit code.
    for (const int number : kSignals) std::signal(number, SIG_IGN);
    control_loop_.stop();
  });
  control.join();
  if (successor_ == 0)
    log::info("stopped", {}, "stopped");
  else
    log::info("stopped", {}, "process {} has stopped, {} goes on", ::getpid(), successor_);
  log::stop(exit_code_);
  return exit_code_;
}

}  // namespace pgsidecar::proxy
