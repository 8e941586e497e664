#include "proxy/stacks.hpp"

#include <execinfo.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "proxy/symbols.hpp"

namespace pgsidecar::proxy {

namespace {

struct Stack {
  std::array<void*, StackSampler::kFrames> frames;
  int size = 0;
};

/// What a thread's samples go to. Only that thread adds, in the signal's handler.
struct Recording {
  std::vector<Stack> stacks;  // as long as it may get
  std::size_t used = 0, lost = 0;
};

// A signal finds its way by these alone: one that is late finds no recording.
struct Slot {
  std::atomic<Recording*> recording{nullptr};
  std::atomic<bool> inside{false};
};
std::array<Slot, StackSampler::kThreads> g_slots;
static_assert(std::atomic<Recording*>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

void* interrupted_at(const void* context) {
  [[maybe_unused]] const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<void*>(machine.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(machine.pc);
#else
  return nullptr;
#endif
}

void record(Recording& recording, const void* context) {
  if (recording.used == recording.stacks.size()) {
    ++recording.lost;
    return;
  }
  Stack& stack = recording.stacks[recording.used++];
  stack.size = ::backtrace(stack.frames.data(), static_cast<int>(stack.frames.size()));
  // The handler's own frames are of no interest.
  const auto end = stack.frames.begin() + stack.size;
  const auto begin = std::find(stack.frames.begin(), end, interrupted_at(context));
  if (begin == end) return;
  std::copy(begin, end, stack.frames.begin());
  stack.size = static_cast<int>(end - begin);
}

// Async-signal-safe: backtrace() is once it has run (its library is loaded then, and it finds its tables without a lock).
void on_signal(int /*number*/, siginfo_t* info, void* context) {
  const auto number = static_cast<std::size_t>(info->si_value.sival_int);
  if (info->si_code != SI_TIMER || number >= g_slots.size()) return;
  const int before = errno;
  Slot& slot = g_slots[number];
  slot.inside.store(true);
  if (Recording* recording = slot.recording.load()) record(*recording, context);
  slot.inside.store(false);
  errno = before;
}

void install_handler() {
  static const bool once = [] {
    void* frame = nullptr;
    ::backtrace(&frame, 1);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    ::sigemptyset(&action.sa_mask);
    return ::sigaction(SIGPROF, &action, nullptr) == 0;  // it stays: a signal may be late
  }();
  (void)once;
}

}  // namespace

struct StackSampler::Thread {
  std::string name;
  pthread_t thread = ::pthread_self();
  pid_t id = static_cast<pid_t>(::syscall(SYS_gettid));
  std::size_t number = 0;
  timer_t timer{};
  bool running = false;
  Recording recording;

  bool start(std::size_t most);
  void stop();
  void fold(Symbols& symbols, std::map<std::string, std::size_t>& folded) const;
};

bool StackSampler::Thread::start(std::size_t most) {
  recording.stacks.resize(most);
  recording.used = recording.lost = 0;
  clockid_t clock{};
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGPROF;
  event.sigev_value.sival_int = static_cast<int>(number);
  event._sigev_un._tid = id;  // glibc names it sigev_notify_thread_id from 2.38 on
  if (::pthread_getcpuclockid(thread, &clock) != 0 || ::timer_create(clock, &event, &timer) != 0) return false;
  running = true;
  g_slots[number].recording.store(&recording);
  itimerspec period{};
  period.it_interval.tv_nsec = period.it_value.tv_nsec = 1'000'000'000 / kHz;
  return ::timer_settime(timer, 0, &period, nullptr) == 0;
}

void StackSampler::Thread::stop() {
  if (!std::exchange(running, false)) return;
  ::timer_delete(timer);
  g_slots[number].recording.store(nullptr);
  while (g_slots[number].inside.load()) std::this_thread::yield();  // for as long as one backtrace takes
}

void StackSampler::Thread::fold(Symbols& symbols, std::map<std::string, std::size_t>& folded) const {
  for (std::size_t i = 0; i < recording.used; ++i) {
    const Stack& stack = recording.stacks[i];
    std::string line = name;
    for (int at = stack.size - 1; at >= 0; --at)
      // All but the innermost are return addresses, which may be the next function's already.
      line.append(";").append(symbols.name(static_cast<const char*>(stack.frames[static_cast<std::size_t>(at)]) - (at > 0)));
    ++folded[line];
  }
  if (recording.lost > 0) folded[name + ";(more than were kept)"] += recording.lost;
}

StackSampler::StackSampler(boost::asio::io_context& control) : timer_(control) {}

StackSampler::~StackSampler() {
  for (const auto& thread : threads_)
    if (thread) thread->stop();
}

void StackSampler::add(std::size_t number, std::string name) {
  threads_[number] = std::make_unique<Thread>();
  threads_[number]->name = std::move(name);
  threads_[number]->number = number;
}

void StackSampler::sample(std::chrono::seconds time, Done done) {
  if (done_) return done("stacks are being sampled already", {});
  install_handler();
  const auto most = static_cast<std::size_t>(std::min(time, kMost).count() * kHz) + 1;
  for (const auto& thread : threads_) {
    if (!thread || thread->start(most)) continue;
    const std::string error = std::string("cannot sample stacks: ") + std::strerror(errno);
    for (const auto& other : threads_)
      if (other) other->stop();
    return done(error, {});
  }
  done_ = std::move(done);
  timer_.expires_after(std::min(time, kMost));
  timer_.async_wait([this](const boost::system::error_code& ec) {
    if (!ec) end();
  });
}

void StackSampler::end() {
  std::map<std::string, std::size_t> folded;
  Symbols symbols;
  for (const auto& thread : threads_) {
    if (!thread) continue;
    thread->stop();
    thread->fold(symbols, folded);
    std::vector<Stack>().swap(thread->recording.stacks);
  }
  std::string text;
  for (const auto& [stack, count] : folded) text += stack + " " + std::to_string(count) + "\n";
  std::exchange(done_, nullptr)({}, std::move(text));
}

}  // namespace pgsidecar::proxy
