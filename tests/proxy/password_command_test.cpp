#include "proxy/password_command.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

namespace pgsidecar::proxy {
namespace {

using namespace std::chrono_literals;

struct PasswordCommandTest : testing::Test {
  boost::asio::io_context loop;
  PasswordCommands passwords{loop};
  std::filesystem::path runs = std::filesystem::path(testing::TempDir()) / ("pgsidecar-runs-" + std::to_string(::getpid()));

  PasswordCommandTest() { std::filesystem::remove(runs); }
  ~PasswordCommandTest() override { std::filesystem::remove(runs); }

  static PasswordCommands::Command shell(const std::string& script, std::chrono::seconds cache = 600s) {
    return {{"/bin/sh", "-c", script}, "db.example.com", 5433, "app", 10s, cache};
  }
  /// A script that leaves a line in `runs` for each time that it is run, and gives how many there are.
  std::string counting() const { return "echo >> " + runs.string() + "; wc -l < " + runs.string(); }

  PasswordCommands::Answer get(const PasswordCommands::Command& command) {
    PasswordCommands::Answer got;
    passwords.get(command, [&](const PasswordCommands::Answer& answer) { got = answer; });
    loop.restart();
    loop.run();
    return got;
  }
};

TEST_F(PasswordCommandTest, TheFirstLineOfOutput) {
  EXPECT_EQ(get(shell("echo '  a b'; echo second")).password, "a b");
  EXPECT_EQ(get(shell("printf 'x\\r\\ny'")).password, "x");
  EXPECT_EQ(get(shell("printf x; echo noise >&2")).password, "x");
  EXPECT_EQ(get({{"echo", "$HOME;|"}, "h", 1, "u", 10s, 600s}).password, "$HOME;|") << "no shell";
  EXPECT_EQ(get(shell("echo $PGUSER@$PGHOST:$PGPORT")).password, "app@db.example.com:5433");
}

TEST_F(PasswordCommandTest, WhatItComplainsOfIsTold) {
  const struct {
    const char *script, *says;
  } rows[] = {
      {"echo secret; echo >&2; echo no credentials >&2; echo more >&2; exit 255",
       "passwordCommand \"/bin/sh\" failed with exit status 255: no credentials"},
      {"exit 3", "passwordCommand \"/bin/sh\" failed with exit status 3"},
      {"kill -9 $$", "passwordCommand \"/bin/sh\" was ended by signal 9"},
      {"echo; echo x", "passwordCommand \"/bin/sh\" gave no password: its first line of output is empty"},
      {"printf 'a\\0b'", "passwordCommand \"/bin/sh\" gave a password with a zero byte"},
      {"head -c 300000 /dev/zero | tr '\\0' x", "passwordCommand \"/bin/sh\" gave more than a password"},
  };
  for (const auto& row : rows) {
    const auto answer = get(shell(row.script));
    EXPECT_EQ(answer.error, row.says) << row.script;
    EXPECT_EQ(answer.password, "") << row.script;
  }
  EXPECT_EQ(get({{"/no/such"}, "h", 1, "u", 10s, 600s}).error, "passwordCommand \"/no/such\" cannot be run: No such file or directory");
  EXPECT_LT(get(shell("head -c 5000 /dev/zero | tr '\\0' x >&2; exit 1")).error.size(), 500u);
}

TEST_F(PasswordCommandTest, OneRunForAllWhoAskMeanwhile) {
  std::vector<std::string> got;
  for (int i = 0; i < 5; ++i)
    passwords.get(shell(counting()), [&](const PasswordCommands::Answer& answer) { got.push_back(answer.password); });
  loop.run();
  EXPECT_EQ(got, std::vector<std::string>(5, "1"));
}

TEST_F(PasswordCommandTest, KeptUntilItIsTooOldOrRefused) {
  EXPECT_EQ(get(shell(counting())).password, "1");
  EXPECT_EQ(get(shell(counting())).password, "1");
  passwords.forget("another");
  EXPECT_EQ(get(shell(counting())).password, "1");
  passwords.forget("1");
  EXPECT_EQ(get(shell(counting())).password, "2");
  passwords.forget_all();
  EXPECT_EQ(get(shell(counting())).password, "3");
  auto another = shell(counting());
  another.user = "other";
  EXPECT_EQ(get(another).password, "4") << "another user's";
  EXPECT_EQ(get(shell(counting() + " #", 0s)).password, "5");
  EXPECT_EQ(get(shell(counting() + " #", 0s)).password, "6");
}

TEST_F(PasswordCommandTest, AFailureIsNotKept) {
  const std::string script = "test -e " + runs.string() + " && echo ok || { touch " + runs.string() + "; exit 1; }";
  EXPECT_NE(get(shell(script)).error, "");
  EXPECT_EQ(get(shell(script)).password, "ok");
}

TEST_F(PasswordCommandTest, OneThatHangsIsEndedWithAllThatItHasStarted) {
  auto command = shell("sleep 1000 & echo $! > " + runs.string() + "; echo hanging >&2; wait");
  command.timeout = 300ms;
  EXPECT_EQ(get(command).error, "passwordCommand \"/bin/sh\" gave no password within 300 ms (passwordCommandTimeoutMillis): hanging");
  pid_t child = 0;
  std::ifstream(runs) >> child;
  ASSERT_GT(child, 0);
  // Whoever inherits it may take a moment to bury it.
  std::string state = "?";
  for (int i = 0; i < 500 && !state.empty() && state != "Z"; ++i) {
    std::ifstream stat("/proc/" + std::to_string(child) + "/stat");
    std::string pid, name;
    state.clear();
    stat >> pid >> name >> state;
    ::usleep(10'000);
  }
  EXPECT_TRUE(state.empty() || state == "Z") << state;
}

TEST_F(PasswordCommandTest, ItsChildrenDoNotHoldTheAnswerUp) {
  auto command = shell("sleep 1000 & echo $!");
  command.timeout = 5s;
  const auto answer = get(command);
  EXPECT_EQ(answer.error, "");
  ::kill(std::stoi("0" + answer.password), SIGKILL);
}

TEST_F(PasswordCommandTest, ItHasNoneOfOurFiles) {
  const int inheritable = ::open("/dev/null", O_RDONLY);
  EXPECT_EQ(get(shell("echo $(ls /proc/self/fd)")).password, "0 1 2 3") << "the last is the listing's own";
  ::close(inheritable);
}

}  // namespace
}  // namespace pgsidecar::proxy
