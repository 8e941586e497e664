#include "proxy/password_command.hpp"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kMostOutput = 64 * 1024, kMostTold = 300, kMostEntries = 1024;
constexpr std::chrono::milliseconds kPollEvery{10};

/// What a program writes to, bounded.
class Output {
 public:
  Output() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return;
    read_ = ends[0];
    write_ = ends[1];
    ::fcntl(read_, F_SETFL, O_NONBLOCK);
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    close_write();
    if (read_ >= 0) ::close(read_);
    OPENSSL_cleanse(text_.data(), text_.size());
  }
  int write_end() const { return write_; }
  void close_write() {
    if (write_ >= 0) ::close(std::exchange(write_, -1));
  }
  /// Takes what is there, at most what a pipe holds. What is too much is read and dropped, so that the program doesn't hang.
  void take() {
    char buffer[4096];
    for (int reads = 0; reads < 16; ++reads) {
      const ssize_t n = ::read(read_, buffer, sizeof buffer);
      if (n <= 0) break;
      too_long_ |= text_.size() >= kMostOutput;
      if (!too_long_) text_.append(buffer, static_cast<std::size_t>(n));
    }
    OPENSSL_cleanse(buffer, sizeof buffer);
  }
  bool too_long() const { return too_long_; }
  const std::string& text() const { return text_; }

 private:
  int read_ = -1, write_ = -1;
  std::string text_;
  bool too_long_ = false;
};

std::string trimmed(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\v\f";
  const auto begin = text.find_first_not_of(kBlanks);
  return begin == text.npos ? std::string() : std::string(text.substr(begin, text.find_last_not_of(kBlanks) + 1 - begin));
}

std::string first_line(const std::string& text) {
  return trimmed(std::string_view(text).substr(0, text.find('\n')));
}

/// What a program has complained of: its first line that isn't empty, as a part of an error's text.
std::string complaint(const std::string& text) {
  std::string line = first_line(text.substr(std::min(text.size(), text.find_first_not_of(" \t\r\v\f\n"))));
  if (line.size() > kMostTold) line.replace(kMostTold, line.npos, "...");
  for (char& c : line)
    if (static_cast<unsigned char>(c) < ' ') c = '?';
  return line.empty() ? line : ": " + line;
}

/// This process's environment and whom the password is for.
std::vector<std::string> environment_for(const PasswordCommands::Command& command) {
  std::vector<std::string> variables{"PGHOST=" + command.host, "PGPORT=" + std::to_string(command.port), "PGUSER=" + command.user};
  const std::size_t own = variables.size();
  for (char** one = ::environ; *one; ++one) {
    const std::string_view variable(*one);
    const auto is_same = [&](const std::string& ours) { return ours.starts_with(variable.substr(0, variable.find('=') + 1)); };
    if (std::none_of(variables.begin(), variables.begin() + static_cast<std::ptrdiff_t>(own), is_same)) variables.emplace_back(variable);
  }
  return variables;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> out;
  out.reserve(texts.size() + 1);
  for (std::string& text : texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

}  // namespace

/// The program at work. Its end is asked for rather than waited for: nothing here may hold up the control loop.
class PasswordCommands::Run {
 public:
  explicit Run(const Command& command) : program_(command.argv.front()), timeout_(command.timeout), began_(Clock::now()) {
    const int error = start(command);
    out_.close_write();
    err_.close_write();
    if (error != 0) failure_ = std::string("cannot be run: ") + std::strerror(error);
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() {
    if (pid_ <= 0) return;
    ::kill(-pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

  bool over() {
    if (pid_ <= 0) return true;
    int status = 0;
    const bool ended = ::waitpid(pid_, &status, WNOHANG) != 0;
    out_.take();
    err_.take();
    if (!ended) {
      if (failure_.empty() && Clock::now() - began_ >= timeout_) {
        failure_ = "gave no password within " + std::to_string(timeout_.count()) + " ms (passwordCommandTimeoutMillis)";
        ::kill(-pid_, SIGKILL);
      }
      return false;
    }
    pid_ = 0;
    if (!failure_.empty()) return true;
    if (WIFSIGNALED(status))
      failure_ = "was ended by signal " + std::to_string(WTERMSIG(status));
    else if (WEXITSTATUS(status) != 0)
      failure_ = "failed with exit status " + std::to_string(WEXITSTATUS(status));
    return true;
  }

  Answer answer() const {
    Answer answer;
    answer.since = began_;
    answer.password = first_line(out_.text());
    std::string failure = failure_;
    if (failure.empty() && out_.too_long()) failure = "gave more than a password";
    if (failure.empty() && answer.password.empty()) failure = "gave no password: its first line of output is empty";
    if (failure.empty() && answer.password.find('\0') != std::string::npos) failure = "gave a password with a zero byte";
    if (failure.empty()) return answer;
    answer.password.clear();
    answer.error = "passwordCommand \"" + program_ + "\" " + failure + complaint(err_.text());
    return answer;
  }

 private:
  int start(const Command& command) {
    if (out_.write_end() < 0 || err_.write_end() < 0) return EMFILE;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, out_.write_end(), 1);
    ::posix_spawn_file_actions_adddup2(&actions, err_.write_end(), 2);
    ::posix_spawn_file_actions_addclosefrom_np(&actions, 3);  // clients' and servers' sockets
    ::posix_spawnattr_init(&attributes);
    sigset_t defaults;
    ::sigemptyset(&defaults);
    ::sigaddset(&defaults, SIGPIPE);
    ::posix_spawnattr_setsigdefault(&attributes, &defaults);
    ::posix_spawnattr_setpgroup(&attributes, 0);  // so that what it starts in turn ends with it
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    std::vector<std::string> arguments = command.argv, variables = environment_for(command);
    const int error =
        ::posix_spawnp(&pid_, arguments.front().c_str(), &actions, &attributes, pointers(arguments).data(), pointers(variables).data());
    ::posix_spawnattr_destroy(&attributes);
    ::posix_spawn_file_actions_destroy(&actions);
    if (error != 0) pid_ = 0;
    return error;
  }

  const std::string program_;
  const std::chrono::milliseconds timeout_;
  const Clock::time_point began_;
  Output out_, err_;
  pid_t pid_ = 0;  // 0: ended
  std::string failure_;
};

PasswordCommands::PasswordCommands(boost::asio::io_context& control) : timer_(control) {}

PasswordCommands::~PasswordCommands() = default;

void PasswordCommands::get(const Command& command, Done done) {
  std::vector<std::string> key = command.argv;
  key.insert(key.end(), {command.host, std::to_string(command.port), command.user});
  if (entries_.size() >= kMostEntries) std::erase_if(entries_, [](const auto& one) { return !one.second.run; });
  Entry& entry = entries_[std::move(key)];
  if (Clock::now() < entry.until) {
    const Answer known = entry.known;  // whoever is told may ask for another
    return done(known);
  }
  entry.waiting.push_back(std::move(done));
  if (entry.run) return;
  entry.cache = command.cache;
  entry.run = std::make_unique<Run>(command);
  look_later();
}

void PasswordCommands::look_later() {
  if (std::exchange(looking_, true)) return;
  timer_.expires_after(kPollEvery);
  timer_.async_wait([this](const boost::system::error_code& ec) {
    looking_ = false;
    if (!ec) look();
  });
}

void PasswordCommands::look() {
  std::vector<std::pair<Done, Answer>> answered;  // who is told may ask anew
  bool running = false;
  for (auto& [key, entry] : entries_) {
    if (!entry.run) continue;
    if (!entry.run->over()) {
      running = true;
      continue;
    }
    entry.known = std::exchange(entry.run, nullptr)->answer();
    entry.until = entry.known.error.empty() ? entry.known.since + entry.cache : Clock::time_point();
    for (Done& done : std::exchange(entry.waiting, {})) answered.emplace_back(std::move(done), entry.known);
    if (entry.until == Clock::time_point()) entry.known = {};
  }
  if (running) look_later();
  for (const auto& [done, answer] : answered) done(answer);
}

void PasswordCommands::forget(const std::string& password) {
  for (auto& [key, entry] : entries_)
    if (entry.known.password == password) entry.until = {};
}

void PasswordCommands::forget_all() {
  for (auto& [key, entry] : entries_) entry.until = {};
}

}  // namespace pgsidecar::proxy
