// Sockets that were there before: taken by role, name and address.
#include "conf/listen.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>

namespace pgsidecar::conf {
namespace {

std::string with_port(const std::string& host, const std::string& address) {
  return host + address.substr(address.rfind(':'));
}

// Descriptors from 3 on are the test's own while it runs.
class PassedTest : public testing::Test {
 protected:
  void SetUp() override {
    for (int fd = 3; fd < 7; ++fd) kept_.push_back(::fcntl(fd, F_DUPFD_CLOEXEC, 100));
  }
  void TearDown() override {
    for (int fd = 3; fd < 7; ++fd) {
      ::close(fd);
      if (const int kept = kept_[static_cast<std::size_t>(fd - 3)]; kept >= 0) {
        ::dup2(kept, fd);
        ::close(kept);
      }
    }
  }
  // A socket that listens on a free port of the host's, as descriptor `fd`.
  static void place(int fd, const char* host, bool listens = true) {
    const int made = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    ::inet_pton(AF_INET, host, &address.sin_addr);
    ASSERT_EQ(::bind(made, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    if (listens) {
      ASSERT_EQ(::listen(made, 8), 0);
    }
    if (made == fd) return;
    ::dup2(made, fd);
    ::close(made);
  }
  static void say(const std::string& count, const std::string& names, const std::string& pid) {
    ::setenv("LISTEN_FDS", count.c_str(), 1);
    ::setenv("LISTEN_FDNAMES", names.c_str(), 1);
    ::setenv("LISTEN_PID", pid.c_str(), 1);
  }

 private:
  std::vector<int> kept_;
};

TEST_F(PassedTest, SystemdsByName) {
  place(3, "127.0.0.1");
  place(4, "127.0.0.1");
  place(5, "0.0.0.0");
  say("3", "clients:admin", std::to_string(::getpid()));
  PassedSockets passed = PassedSockets::from_environment();
  for (const char* name : {"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"}) EXPECT_EQ(std::getenv(name), nullptr);
  EXPECT_EQ(passed.take_link(), -1);
  const auto admin = passed.take_passed(true), clients = passed.take_passed(false);
  ASSERT_EQ(admin.size(), 1u);
  EXPECT_EQ(admin[0].fd, 4);
  ASSERT_EQ(clients.size(), 2u);
  EXPECT_TRUE(clients[0].passed && clients[1].passed);
  EXPECT_NE(::fcntl(3, F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_NE(::fcntl(3, F_GETFL) & O_NONBLOCK, 0);
  EXPECT_TRUE(passed.covers(AF_INET, clients[0].address));
  EXPECT_FALSE(passed.covers(AF_INET, with_port("127.0.0.2", clients[0].address)));
  EXPECT_TRUE(passed.covers(AF_INET, with_port("127.0.0.2", clients[1].address)));  // by 0.0.0.0
  EXPECT_FALSE(passed.covers(AF_INET6, with_port("[::1]", clients[1].address)));
  EXPECT_FALSE(passed.take_own(false, AF_INET, clients[0].address));
  const std::string text = clients[1].address;
  const Listen where{Listen::Kind::Tcp, "127.0.0.1", static_cast<std::uint16_t>(std::stoi(text.substr(text.rfind(':') + 1))), {}};
  EXPECT_TRUE(open_listeners(where, 8, passed, false).empty());
}

TEST_F(PassedTest, AnotherProcesssAreLeftAlone) {
  place(3, "127.0.0.1");
  say("1", "clients", std::to_string(::getppid()));
  PassedSockets passed = PassedSockets::from_environment();
  EXPECT_TRUE(passed.take_passed(false).empty());
  EXPECT_EQ(::fcntl(3, F_GETFD) & FD_CLOEXEC, 0);
}

TEST_F(PassedTest, ItsOwnFromTheOneBefore) {
  place(3, "127.0.0.1");
  place(4, "127.0.0.1");
  place(5, "127.0.0.1");
  for (const std::string& one :
       PassedSockets::environment_for({{3, AF_INET, "", false, false}, {4, AF_INET, "", true, false}, {5, AF_INET, "", false, true}})) {
    const auto equals = one.find('=');
    ::setenv(one.substr(0, equals).c_str(), one.substr(equals + 1).c_str(), 1);
  }
  ::dup2(3, 6);  // the link: any descriptor
  PassedSockets passed = PassedSockets::from_environment();
  EXPECT_EQ(std::getenv("PGSIDECAR_TAKES_OVER"), nullptr);
  EXPECT_EQ(passed.take_link(), 6);
  ASSERT_EQ(passed.take_passed(false).size(), 1u);
  EXPECT_TRUE(passed.take_passed(true).empty());
  const auto clients = passed.take_own(false, AF_INET, "127.0.0.1:0");
  ASSERT_TRUE(clients);
  EXPECT_EQ(clients->fd, 3);
  EXPECT_FALSE(passed.take_own(false, AF_INET, clients->address));  // once
  const auto admin = passed.take_own(true, AF_INET, "127.0.0.1:0");
  ASSERT_TRUE(admin);
  EXPECT_EQ(admin->fd, 5);
}

TEST_F(PassedTest, WhatDoesNotListenIsRefused) {
  place(3, "127.0.0.1", false);
  say("1", "clients", std::to_string(::getpid()));
  EXPECT_THROW(PassedSockets::from_environment(), std::runtime_error);
}

}  // namespace
}  // namespace pgsidecar::conf
