// The command line, and the joining of proxy and admin.
#include <fcntl.h>
#include <malloc.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "admin/alerts.hpp"
#include "admin/client.hpp"
#include "admin/history.hpp"
#include "admin/monitor.hpp"
#include "admin/profile.hpp"
#include "admin/server.hpp"
#include "admin/webhook.hpp"
#include "conf/load.hpp"
#include "proxy/log.hpp"
#include "proxy/supervisor.hpp"
#include "proxy/tls.hpp"

namespace {

using namespace pgsidecar;

constexpr int kMistake = 2;

constexpr const char* kHelp =
    "pgsidecar: a PostgreSQL connection pooler that runs beside its application\n"
    "\n"
    "  pgsidecar [run] [--config FILE]   run; with DATABASE_URL set no file is needed\n"
    "  pgsidecar check [--config FILE]   validate, print the effective configuration (secrets redacted)\n"
    "  pgsidecar healthcheck             exit 0 if the running pgsidecar is alive\n"
    "  pgsidecar wait [--max 30s]        wait until it is ready; with --started until it listens, whatever the database does\n"
    "  pgsidecar shutdown                tell it to drain and exit\n"
    "  pgsidecar upgrade                 have it started anew, as the binary and the configuration are now, without a pause\n"
    "  pgsidecar --version | --help\n"
    "\n"
    "Every key of the configuration but those of databases, users and alerts.webhooks is also an environment\n"
    "variable: PGSIDECAR_ and its path in upper snake case (PGSIDECAR_POOL_MAX, PGSIDECAR_ADMIN_LISTEN).\n"
    "PGSIDECAR_CONFIG names the file.\n"
    "Exit codes: 0 clean stop, 1 run-time failure, 2 configuration mistake, 3 forced end of a drain.\n";

struct Arguments {
  std::string command = "run", config;
  std::chrono::milliseconds max{30000};
  bool started = false;
};

/// "30s", "500ms", "2m" or seconds; negative if it is none.
std::chrono::milliseconds parse_duration(std::string_view text) {
  char* end = nullptr;
  const std::string copy(text);
  const double n = std::strtod(copy.c_str(), &end);
  const std::string_view unit(end);
  const double factor = unit == "ms" ? 1 : unit.empty() || unit == "s" ? 1000 : unit == "m" ? 60000 : -1;
  if (end == copy.c_str() || factor < 0 || !(n >= 0 && n < 1e9)) return std::chrono::milliseconds(-1);
  return std::chrono::milliseconds(static_cast<std::int64_t>(n * factor));
}

[[noreturn]] void usage(const std::string& mistake) {
  std::cerr << "pgsidecar: " << mistake << "\nTry: pgsidecar --help\n";
  std::exit(kMistake);
}

/// A connection string is as good as its password: it isn't shown.
[[noreturn]] void refuse(std::string_view argument) {
  if (argument.find("://") == argument.npos && argument.find('=') == argument.npos)
    usage("unknown argument \"" + std::string(argument) + "\"");
  usage("unknown argument; a connection string belongs into DATABASE_URL, or upstream.url in the file");
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  if (const char* file = std::getenv("PGSIDECAR_CONFIG")) arguments.config = file;
  bool have_command = false, of_wait = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto value = [&](std::string_view name) -> std::string {
      if (argument.size() > name.size() && argument[name.size()] == '=') return std::string(argument.substr(name.size() + 1));
      if (i + 1 >= argc) usage(std::string(name) + " needs a value");
      return argv[++i];
    };
    if (argument == "--version" || argument == "-V") {
      std::cout << "pgsidecar " PGSIDECAR_VERSION "\n";
      std::exit(0);
    } else if (argument == "--help" || argument == "-h" || argument == "help") {
      std::cout << kHelp;
      std::exit(0);
    } else if (argument == "--config" || argument.starts_with("--config=")) {
      arguments.config = value("--config");
      if (arguments.config.empty()) usage("--config needs a file");
    } else if (argument == "--max" || argument.starts_with("--max=")) {
      arguments.max = parse_duration(value("--max"));
      if (arguments.max.count() < 0) usage("--max takes a duration such as 30s");
      of_wait = true;
    } else if (argument == "--started") {
      arguments.started = of_wait = true;
    } else if (!have_command && (argument == "run" || argument == "check" || argument == "healthcheck" || argument == "wait" ||
                                 argument == "shutdown" || argument == "upgrade")) {
      arguments.command = argument;
      have_command = true;
    } else {
      refuse(argument);
    }
  }
  if (arguments.config.find("://") != std::string::npos) refuse(arguments.config);
  if (of_wait && arguments.command != "wait") usage("--max and --started are for wait");
  return arguments;
}

/// What is closed of stdin, stdout and stderr is /dev/null, so that no socket gets its number and a log's lines.
void open_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd)
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", O_RDWR) < 0) std::exit(1);
}

/// For `systemctl status`.
std::string status_line(const pool::Snapshot& snapshot) {
  std::uint32_t waiting = 0, used = 0, idle = 0;
  for (const pool::PoolSnapshot& pool : snapshot.pools) {
    waiting += pool.clientsWaiting;
    used += pool.serversActive;
    idle += pool.serversIdle;
  }
  return std::to_string(snapshot.clients) + " clients, " + std::to_string(waiting) +
         " of them waiting; server connections: " + std::to_string(used) + " in use, " + std::to_string(idle) + " idle" +
         (snapshot.draining ? "; draining" : "");
}

int run(const Arguments& arguments, const std::shared_ptr<const conf::Config>& config, const conf::Environment& env, proxy::Program program,
        conf::PassedSockets& passed, const std::vector<std::string>& unused_variables) {
  ::mallopt(M_ARENA_MAX, 2);  // two threads allocate
  proxy::log::start(config->log);
  for (const std::string& line : unused_variables) proxy::log::warn("unused_variable", {}, "{}", line);
  proxy::Supervisor supervisor(arguments.config, config, env, std::move(program));
  admin::Server::Callbacks callbacks;
  callbacks.snapshot = [&](pool::Snapshot::Detail detail, proxy::Supervisor::SnapshotDone done) {
    supervisor.snapshot(detail, std::move(done));
  };
  callbacks.command = [&](const pool::Command& command, std::function<void(std::string)> done) {
    supervisor.command(command, std::move(done));
  };
  admin::History history;
  admin::Profile profile;
  admin::Monitor monitor(supervisor.control_loop(), [&](proxy::Supervisor::SnapshotDone done, std::function<void()> happened) {
    supervisor.watch(std::move(done), std::move(happened));
  });
  admin::Alerts alerts(config->alerts);
  admin::Webhooks webhooks(supervisor.control_loop(), [](const std::string& line) { proxy::log::warn("webhook", {}, "{}", line); });
  callbacks.alerts = [&] { return admin::alerts_json(alerts, webhooks.json(), admin::Clock::now()); };
  callbacks.active_alerts = [&] { return alerts.active(); };
  callbacks.wake = [&] { monitor.wake(); };
  callbacks.history = [&](std::uint32_t window, std::uint32_t step) {
    const auto now = admin::Clock::now();
    if (monitor.resting()) history.rest(now);
    return history.json(window, step, now);
  };
  callbacks.profile = [&](const pool::Snapshot& snapshot, std::uint32_t window) {
    return profile.json(snapshot, window, history.footprint(), admin::Clock::now());
  };
  callbacks.stacks = [&](std::chrono::seconds time, std::function<void(std::string, std::string)> done) {
    supervisor.stacks(time, std::move(done));
  };
  callbacks.config = [&] { return conf::to_redacted_yaml(supervisor.config(), env); };
  callbacks.probe = [&](proxy::Supervisor::SnapshotDone done) { supervisor.probe(std::move(done)); };
  callbacks.act = [&](std::string_view action, std::vector<std::string>& changes) -> std::string {
    if (action == "reload") return supervisor.reload(&changes);
    supervisor.drain();
    return {};
  };
  callbacks.upgrade = [&](std::function<void(std::string, int)> done) { supervisor.upgrade(std::move(done)); };
  admin::Server server(supervisor.control_loop(), config->admin, std::move(callbacks));
  server.listen(passed);
  supervisor.other_sockets = [&] { return server.listening(); };
  monitor.add([&](const admin::Sample& sample) {
    history.add(sample);
    profile.add(sample);
    return admin::Monitor::kNever;
  });
  monitor.add([&](const admin::Sample& sample) {
    alerts.set(supervisor.config().alerts);
    webhooks.set(supervisor.config().alerts.webhooks);
    const auto changes = alerts.look(sample);
    for (const admin::Alert& alert : changes) {
      if (alert.ended)
        proxy::log::info("alert_ended", {}, "alert {} ended: {}", alert.name, alert.summary);
      else
        proxy::log::warn("alert", {}, "alert {} ({}): {}", alert.name, alert.severity, alert.summary);
    }
    webhooks.tell(changes, alerts.active());
    return alerts.next();
  });
  monitor.add([&](const admin::Sample& sample) { return server.publish(sample); });
  supervisor.on_reloaded = [&] {
    server.set(supervisor.config().admin);
    monitor.wake();
  };
  monitor.add([&](const admin::Sample& sample) {
    if (sample.snapshot) supervisor.status(status_line(*sample.snapshot));
    return admin::Monitor::kNever;
  });
  return supervisor.run(
      passed,
      [&] {
        server.begin();
        for (const conf::Listening& one : server.listening()) proxy::log::info("admin_listening", {}, "admin at http://{}", one.address);
        monitor.start();
      },
      [&] {
        server.stop();
        monitor.stop();
        webhooks.stop();
      });
}

}  // namespace

int main(int argc, char** argv) {
  open_standard_streams();
  ::prctl(PR_SET_DUMPABLE, 0);  // there are passwords in its memory
  const Arguments arguments = parse(argc, argv);
  const conf::Environment env = conf::process_environment();
  std::set<std::string, std::less<>> asked;
  try {
    if (arguments.command == "healthcheck") return admin::healthcheck(conf::load_admin(arguments.config, env));
    if (arguments.command == "wait") return admin::wait(conf::load_admin(arguments.config, env), arguments.max, arguments.started);
    if (arguments.command == "shutdown") return admin::shutdown(conf::load_admin(arguments.config, env));
    if (arguments.command == "upgrade") return admin::upgrade(conf::load_admin(arguments.config, env));
    if (arguments.command == "check") {
      const conf::Config config = conf::load(arguments.config, conf::noting(env, asked), proxy::file_checks());
      std::vector<std::string> warnings = conf::upstream_warnings(config, env);
      for (std::string& line : conf::unused_variables(asked, ::environ)) warnings.push_back(std::move(line));
      for (const std::string& warning : warnings) std::cerr << "pgsidecar: warning: " << warning << "\n";
      std::cout << conf::to_redacted_yaml(config, env);
      return 0;
    }
  } catch (const conf::ConfigError& e) {
    std::cerr << "pgsidecar: " << e.what() << "\n";
    return kMistake;
  }
  std::optional<conf::PassedSockets> passed;
  // Told to the process that this one was to take over from, too.
  const auto fail = [&](const std::string& why, int code) {
    if (const int link = passed ? passed->take_link() : -1; link >= 0) proxy::Succession::tell_failure(link, why);
    proxy::log::stop(code);
    std::cerr << "pgsidecar: " << why << "\n";
    return code;
  };
  proxy::hold_signals();
  try {
    proxy::Program program = proxy::Program::of(argc, argv);
    passed.emplace(conf::PassedSockets::from_environment());
    auto config = std::make_shared<const conf::Config>(conf::load(arguments.config, conf::noting(env, asked), proxy::file_checks()));
    return run(arguments, config, env, std::move(program), *passed, conf::unused_variables(asked, ::environ));
  } catch (const conf::ConfigError& e) {
    return fail(e.what(), kMistake);
  } catch (const std::exception& e) {
    return fail(e.what(), 1);
  }
}
