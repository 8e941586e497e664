// gcc 12 destroys an aggregate temporary or a capturing lambda that is written inside the full expression of a co_await
// twice. The forms here are those that proxy/connect.cpp keeps to; each value must be destroyed as often as it was made.
#include <gtest/gtest.h>

#include <coroutine>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

/// Counts its lives.
struct Counted {
  static inline int alive = 0;
  Counted() { ++alive; }
  Counted(const Counted&) { ++alive; }
  Counted(Counted&&) noexcept { ++alive; }
  Counted& operator=(const Counted&) = default;
  ~Counted() { --alive; }
};

/// An aggregate with something to destroy, as Target and Upstream are.
struct Aggregate {
  Counted counted;
  std::string name;
};

/// A coroutine that runs at once, to be resumed by hand; the least that boost::asio::awaitable does too.
template <class T>
class Task {
 public:
  struct promise_type {
    std::optional<T> value;
    std::coroutine_handle<> continuation;
    Task get_return_object() { return Task(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    struct Final {
      bool await_ready() noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> h) noexcept {
        return h.promise().continuation ? h.promise().continuation : std::noop_coroutine();
      }
      void await_resume() noexcept {}
    };
    Final final_suspend() noexcept { return {}; }
    void return_value(T v) { value = std::move(v); }
    void unhandled_exception() { std::terminate(); }
  };
  explicit Task(std::coroutine_handle<promise_type> h) : handle_(h) {}
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  ~Task() {
    if (handle_) handle_.destroy();
  }
  bool await_ready() const { return false; }
  std::coroutine_handle<> await_suspend(std::coroutine_handle<> h) {
    handle_.promise().continuation = h;
    return handle_;
  }
  T await_resume() { return std::move(*handle_.promise().value); }
  void start() { handle_.resume(); }
  const std::optional<T>& result() const { return handle_.promise().value; }

 private:
  std::coroutine_handle<promise_type> handle_;
};

/// Suspends; resumed by the test's loop.
std::vector<std::coroutine_handle<>> waiting;
struct Wait {
  bool await_ready() const { return false; }
  void await_suspend(std::coroutine_handle<> h) { waiting.push_back(h); }
  void await_resume() const {}
};
struct WaitWith {  // an operation that takes a handler, as async_wait does
  std::function<void()> handler;
  bool await_ready() const { return false; }
  void await_suspend(std::coroutine_handle<> h) { waiting.push_back(h); }
  void await_resume() const {
    if (handler) handler();
  }
};

template <class T>
std::optional<T> run(Task<T> task) {
  task.start();
  while (!waiting.empty()) {
    const auto h = waiting.back();
    waiting.pop_back();
    h.resume();
  }
  return task.result();
}

Task<int> takes(Aggregate by_value, std::string where) {
  co_await Wait{};
  co_return static_cast<int>(by_value.name.size() + where.size());
}

// log_in(upstream, target, tls, wanted): named arguments, copied into the frame.
Task<int> named_arguments() {
  const Aggregate target{{}, "a name that does not fit into the string itself"};
  const std::string where = "another one, longer than sixteen bytes";
  co_return co_await takes(target, where);
}

Task<int> moved_arguments() {
  Aggregate target{{}, "a name that does not fit into the string itself"};
  co_return co_await takes(std::move(target), "where");
}

// const auto wait = [&transport](bool write) {...}; co_await wait(false): a lambda that has a name, called inside.
Task<int> named_lambda() {
  const Counted counted;
  const auto wait = [counted](bool) { return Wait{}; };
  co_await wait(false);
  co_await wait(true);
  co_return 1;
}

// Control::Done done = [..]; resolve(.., std::move(done)): a handler with captures, named and moved.
Task<int> named_handler() {
  const Counted counted;
  int called = 0;
  std::function<void()> done = [counted, &called] { ++called; };
  WaitWith operation{std::move(done)};
  co_await operation;
  co_return called;
}

// Loops with several waits, and a return in the middle of one.
Task<int> left_in_a_loop() {
  for (int round = 0;; ++round) {
    const Aggregate kept{{}, "a name that does not fit into the string itself"};
    const std::string where = "for each round";
    if (co_await takes(kept, where) > 0 && round == 2) co_return round;
  }
}

// A wait inside try, as in log_in: the values around it end once.
Task<int> inside_try() {
  const Aggregate kept{{}, "x"};
  try {
    co_await Wait{};
    throw std::string("thrown on");
  } catch (const std::string& e) {
    co_return static_cast<int>(e.size());
  }
}

TEST(Coroutine, TheFormsInUseDestroyEachValueOnce) {
  const struct {
    const char* form;
    Task<int> (*function)();
    int result;
  } rows[] = {{"named arguments", named_arguments, 85}, {"moved arguments", moved_arguments, 52}, {"named lambda", named_lambda, 1},
              {"named handler", named_handler, 1},      {"left in a loop", left_in_a_loop, 2},    {"inside try", inside_try, 9}};
  for (const auto& row : rows) {
    Counted::alive = 0;
    EXPECT_EQ(run(row.function()), row.result) << row.form;
    EXPECT_EQ(Counted::alive, 0) << row.form;
  }
}

// A connect that is given up: the frame is destroyed while it waits.
TEST(Coroutine, AFrameThatIsDestroyedEndsItsValues) {
  Counted::alive = 0;
  {
    Task<int> task = named_handler();
    task.start();
    EXPECT_GT(Counted::alive, 0);
  }
  waiting.clear();
  EXPECT_EQ(Counted::alive, 0);
}

/// Without a string: destroyed twice, it would end the test.
struct Plain {
  Counted counted;
  int n;
};
Task<int> takes_plain(Plain plain) {
  co_await Wait{};
  co_return plain.n;
}
struct WaitWithCounted {
  Counted counted;
  template <class F>
  explicit WaitWithCounted(F&& f) : counted(f.counted) {}
  bool await_ready() const { return false; }
  void await_suspend(std::coroutine_handle<> h) { waiting.push_back(h); }
  void await_resume() const {}
};
struct Lambda {  // what `[counted] {}` is, an aggregate or not
  Counted counted;
};

Task<int> aggregate_temporary() {
  co_return co_await takes_plain(Plain{{}, 1});
}
Task<int> braced_argument() {
  co_return co_await takes_plain({{}, 1});
}
Task<int> lambda_temporary() {
  const Counted counted;
  co_await WaitWithCounted(Lambda{counted});
  co_return 1;
}

// The forms to keep out: tells whether this compiler still needs the rule. Compilers that are right must stay so.
TEST(Coroutine, TheFormsToAvoid) {
  std::string wrong;
  const struct {
    const char* form;
    Task<int> (*function)();
  } rows[] = {{"aggregate temporary", aggregate_temporary}, {"braced argument", braced_argument}, {"lambda temporary", lambda_temporary}};
  for (const auto& [form, function] : rows) {
    Counted::alive = 0;
    EXPECT_EQ(run(function()), 1) << form;
    if (Counted::alive != 0) wrong += std::string(wrong.empty() ? "" : ", ") + form;
  }
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
  std::printf("destroyed twice by this compiler: %s\n", wrong.c_str());
#else
  EXPECT_EQ(wrong, "");
#endif
}

}  // namespace
