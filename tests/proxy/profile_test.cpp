// The meter, the stack sampler and its symbols.
#include <gtest/gtest.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "proxy/meter.hpp"
#include "proxy/stacks.hpp"
#include "proxy/symbols.hpp"

namespace pgsidecar::proxy {

/// Burns CPU under a name that must be found, until told otherwise.
[[gnu::noinline]] double burn_for_the_profile(const std::function<bool()>& on) {
  double sum = 0;
  for (int i = 1; i % 1000 != 0 || on(); ++i) sum += std::sqrt(i);
  return sum;
}

namespace {

using namespace std::chrono_literals;
using pool::Phase;

std::uint64_t nanos(const Meter& meter, Phase phase) {
  return meter.counters.nanos[static_cast<std::size_t>(phase)];
}

TEST(Meter, OneTurnInSoManyIsTimed) {
  Meter meter;
  for (int turn = 0; turn < 10 * Meter::kEvery; ++turn) {
    meter.begin_turn();
    meter.end_turn();
  }
  EXPECT_EQ(meter.counters.turns, 10u * Meter::kEvery);
  EXPECT_LE(meter.counters.sampled, 10u) << "but those that were interrupted";
}

TEST(Meter, TimeIsTheInnermostPhases) {
  Meter meter;
  const auto wait = [](std::chrono::microseconds time) {
    for (const auto end = Meter::Clock::now() + time; Meter::Clock::now() < end;) continue;
  };
  // Until a timed one wasn't interrupted by others who want the CPU.
  for (int turn = 0; turn < 100'000 * Meter::kEvery && meter.counters.sampled == 0; ++turn) {
    const bool timed = turn % Meter::kEvery == Meter::kEvery - 1;
    meter.begin_turn();
    {
      const Meter::Span tls(meter, Phase::Tls);
      if (timed) wait(10us);
      {
        const Meter::Span receive(meter, Phase::Receive);
        if (timed) wait(20us);
      }
      if (timed) wait(10us);
    }
    if (timed) wait(30us);
    meter.end_turn();
  }
  ASSERT_EQ(meter.counters.sampled, 1u);
  EXPECT_GE(nanos(meter, Phase::Tls), 20'000u);
  EXPECT_GE(nanos(meter, Phase::Receive), 20'000u);
  EXPECT_GE(nanos(meter, Phase::Decide), 30'000u);
  EXPECT_EQ(nanos(meter, Phase::Send), 0u);
}

TEST(Meter, ATurnInWhichOthersRanIsLeftOut) {
  Meter meter;
  for (int turn = 0; turn < Meter::kEvery; ++turn) {
    meter.begin_turn();
    if (turn == Meter::kEvery - 1) std::this_thread::sleep_for(1ms);
    meter.end_turn();
  }
  EXPECT_EQ(meter.counters.turns, std::uint64_t{Meter::kEvery});
  EXPECT_EQ(meter.counters.sampled, 0u);
}

TEST(Meter, OutsideATurnNothingIsTimed) {
  Meter meter;
  const Meter::Span receive(meter, Phase::Receive);
  EXPECT_EQ(std::accumulate(meter.counters.nanos.begin(), meter.counters.nanos.end(), std::uint64_t{0}), 0u);
}

TEST(ShortName, LeavesWhatAFlameGraphHasRoomFor) {
  for (const auto& [full, expected] : std::vector<std::pair<std::string, std::string>>{
           {"main", "main"},
           {"pgsidecar::proxy::ClientSession::on_readable(boost::system::error_code const&)",
            "pgsidecar::proxy::ClientSession::on_readable"},
           {"std::vector<int, std::allocator<int> >::size() const", "std::vector::size"},
           {"void boost::asio::detail::f<int (*)(long)>(int)", "boost::asio::detail::f"},
           {"pgsidecar::proxy::(anonymous namespace)::open(int)", "pgsidecar::proxy::open"},
           {"a::b(int)::{lambda(char)#1}::operator()(char) const", "a::b::{lambda#1}::operator()"},
           {"a::operator<(a const&, a const&)", "a::operator<"},
           {"operator new(unsigned long)", "operator new"},
           {"std::ostream& std::operator<< <char>(std::ostream&)", "std::operator<<"},
           {"f(int) [clone .cold]", "f"},
           {"f;g", "f:g"},
           {"", ""}})
    EXPECT_EQ(short_name(full), expected) << full;
}

TEST(Symbols, KnowsThisExecutableAndTheLibraries) {
  Symbols symbols;
  EXPECT_EQ(symbols.name(reinterpret_cast<const char*>(&burn_for_the_profile) + 1), "pgsidecar::proxy::burn_for_the_profile");
  EXPECT_EQ(symbols.name(reinterpret_cast<const void*>(&std::abort)), "abort");
  EXPECT_EQ(symbols.name(reinterpret_cast<const void*>(std::uintptr_t{16})), "[unknown]");
}

class StackSamplerTest : public ::testing::Test {
 protected:
  void sample(std::chrono::seconds time) {
    sampler_.sample(time, [this](const std::string& error, const std::string& folded) {
      ++answers_;
      error_ = error;
      folded_ = folded;
    });
  }
  boost::asio::io_context control_{1};
  StackSampler sampler_{control_};
  int answers_ = 0;
  std::string error_, folded_;
};

TEST_F(StackSamplerTest, FindsWhatBurnsCpu) {
  sampler_.add(0, "here");
  const auto begin = std::chrono::steady_clock::now();
  sample(1s);
  burn_for_the_profile([this] { return control_.poll(), answers_ == 0; });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;  // the second may end late
  EXPECT_EQ(error_, "");
  EXPECT_EQ(folded_.substr(0, 5), "here;");
#if !defined(__SANITIZE_THREAD__)  // it holds signals back
  EXPECT_NE(folded_.find("burn_for_the_profile"), std::string::npos) << folded_;
#endif
  std::size_t samples = 0;
  std::istringstream lines(folded_);
  for (std::string line; std::getline(lines, line);) samples += std::stoul(line.substr(line.rfind(' ')));
  EXPECT_GE(samples, 1u);
  EXPECT_LE(static_cast<double>(samples), StackSampler::kHz * took.count() + 1);
}

TEST_F(StackSamplerTest, OneAtATimeAndThenAgain) {
  sampler_.add(0, "here");
  sample(1s);
  sample(1s);
  EXPECT_NE(error_.find("already"), std::string::npos);
  control_.run();
  EXPECT_EQ(answers_, 2);
  control_.restart();
  sample(1s);
  control_.run();
  EXPECT_EQ(answers_, 3);
  EXPECT_EQ(error_, "");
}

TEST_F(StackSamplerTest, ASignalFromElsewhereIsHarmless) {
  sampler_.add(0, "here");
  sample(1s);
  std::raise(SIGPROF);
  control_.run();
  std::raise(SIGPROF);
  EXPECT_EQ(error_, "");
}

}  // namespace
}  // namespace pgsidecar::proxy
