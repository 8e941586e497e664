#include "proxy/launch.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <string_view>

namespace pgsidecar::proxy {

namespace {

constexpr int kFirst = 3;  // where the new process finds what it is given

bool same_file(const std::string& path, const struct stat& other) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 && found.st_dev == other.st_dev && found.st_ino == other.st_ino;
}

std::vector<std::string> candidates(const std::string& name) {
  if (name.find('/') != std::string::npos) return {std::filesystem::absolute(name).string()};
  std::vector<std::string> found;
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) found.push_back((folder.empty() ? "." : folder) + "/" + name);
  return found;
}

/// As exec takes them; they point into `texts`.
std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  out.reserve(texts.size() + 1);
  for (const std::string& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

std::vector<std::string> environment(const std::vector<conf::Listening>& sockets) {
  std::vector<std::string> out = conf::PassedSockets::environment_for(sockets);
  for (char** one = environ; *one; ++one)
    if (!std::string_view(*one).starts_with("WATCHDOG_PID=")) out.emplace_back(*one);  // it is another one's
  return out;
}

void close_from(int first) {
  if (::close_range(static_cast<unsigned>(first), ~0u, 0) == 0) return;
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  for (int fd = first; fd < static_cast<int>(limit.rlim_cur); ++fd) ::close(fd);
}

/// Between fork and exec, where only what is safe in a signal handler may be called.
[[noreturn]] void become(const char* path, char* const* arguments, char* const* variables, const std::vector<int>& given, int tell,
                         const sigset_t& mask) {
  for (const int number : {SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2}) std::signal(number, SIG_DFL);
  int next = kFirst;
  for (const int fd : given) ::dup2(fd, next++);  // all of them are above
  ::dup2(tell, next);
  ::fcntl(next, F_SETFD, FD_CLOEXEC);
  close_from(next + 1);
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  ::execve(path, arguments, variables);
  const int error = -errno;
  [[maybe_unused]] const auto written = ::write(next, &error, sizeof error);
  ::_exit(127);
}

/// Owns descriptors until they are let go.
struct Descriptors {
  std::vector<int> all;
  ~Descriptors() {
    for (const int fd : all) ::close(fd);
  }
};

}  // namespace

Program Program::of(int argc, char** argv) {
  Program program;
  program.arguments.assign(argv, argv + argc);
  struct stat self {};
  ::stat("/proc/self/exe", &self);
  for (const std::string& candidate : candidates(argc > 0 ? argv[0] : ""))
    if (same_file(candidate, self)) {
      program.path = candidate;
      return program;
    }
  std::error_code ec;
  program.path = std::filesystem::read_symlink("/proc/self/exe", ec).string();
  constexpr std::string_view kReplaced = " (deleted)";
  if (program.path.ends_with(kReplaced)) program.path.resize(program.path.size() - kReplaced.size());
  return program;
}

Launched launch(const Program& program, const std::vector<conf::Listening>& sockets) {
  const auto failed = [&](int error) { return Launched{0, -1, "cannot start " + program.path + ": " + std::strerror(error)}; };
  std::array<int, 2> link{-1, -1}, tell{-1, -1};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, link.data()) != 0) return failed(errno);
  Descriptors own{{link[0], link[1]}};
  if (::pipe2(tell.data(), O_CLOEXEC) != 0) return failed(errno);
  Descriptors pipe{{tell[0], tell[1]}}, above;
  std::vector<int> given;
  given.reserve(sockets.size() + 2);
  for (const conf::Listening& one : sockets) given.push_back(one.fd);
  given.push_back(link[1]);
  given.push_back(tell[1]);
  const int room = kFirst + static_cast<int>(given.size());
  for (int& fd : given) {
    fd = ::fcntl(fd, F_DUPFD_CLOEXEC, room);
    if (fd < 0) return failed(errno);
    above.all.push_back(fd);
  }
  const int tells = given.back();
  given.pop_back();
  const std::vector<std::string> variables = environment(sockets);
  const auto arguments = pointers(program.arguments), environment_pointers = pointers(variables);

  // Asio's handlers must not see, in the copy, what is meant for this process.
  sigset_t every, mask;
  ::sigfillset(&every);
  ::pthread_sigmask(SIG_SETMASK, &every, &mask);
  const pid_t between = ::fork();
  if (between == 0) {
    const pid_t child = ::_Fork();
    if (child == 0) become(program.path.c_str(), arguments.data(), environment_pointers.data(), given, tells, mask);
    const pid_t told = child < 0 ? -errno : child;
    [[maybe_unused]] const auto written = ::write(tells, &told, sizeof told);
    ::_exit(0);
  }
  const int error = errno;
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  if (between < 0) return failed(error);
  ::close(pipe.all.back());
  pipe.all.pop_back();
  ::close(tells);
  std::erase(above.all, tells);
  while (::waitpid(between, nullptr, 0) < 0 && errno == EINTR) {
  }
  // The pid, and, if it came to that, the negative errno of fork or exec.
  Launched launched;
  int failure = 0;
  for (int word = 0; ::read(tell[0], &word, sizeof word) == sizeof word;) {
    if (word < 0) failure = -word;
    if (word > 0) launched.pid = word;
  }
  if (failure != 0 || launched.pid == 0) return failed(failure != 0 ? failure : ECHILD);
  own.all = {link[1]};
  launched.link = link[0];
  return launched;
}

}  // namespace pgsidecar::proxy
