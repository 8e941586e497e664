#include "proxy/transport.hpp"

#include <gtest/gtest.h>

#include <boost/asio/ip/tcp.hpp>
#include <csignal>

#include "support.hpp"

namespace pgsidecar::proxy {
namespace {

using test::Pair;
using test::pattern;
using test::read_all;

/// Plain over a unix socket pair, plain over loopback, TLS 1.2 and 1.3.
enum class Kind { Unix, Tcp, Tls12, Tls13 };
constexpr const char* kNames[] = {"Unix", "Tcp", "Tls12", "Tls13"};

struct Contexts {
  Contexts() : identity(certificates.make({.common_name = "server"})) {
    conf::Tls tls;
    tls.mode = conf::TlsMode::Allow;
    tls.certificate = identity.certificate_file;
    tls.key = identity.key_file;
    server = make_server_context(tls);
    params.sslmode = conf::SslMode::Prefer;
    client = make_client_context(params);
    params.sslMaxProtocolVersion = "TLSv1.2";
    client12 = make_client_context(params);
  }
  test::Certificates certificates;
  test::Identity identity;
  conf::ConnectParams params;
  SslContext server, client, client12;
};

Contexts& contexts() {
  static Contexts all;
  return all;
}

/// Two transports that are through with their handshake: `near` is the client.
struct Link : Pair {
  explicit Link(Kind kind) {
    std::signal(SIGPIPE, SIG_IGN);  // as the supervisor does
    if (kind == Kind::Tcp) {
      namespace ip = boost::asio::ip;
      ip::tcp::acceptor acceptor(loop, ip::tcp::endpoint(ip::address_v4::loopback(), 0));
      ip::tcp::socket client(loop);
      client.connect(acceptor.local_endpoint());
      ip::tcp::socket server = acceptor.accept();
      for (auto* socket : {&client, &server}) socket->set_option(ip::tcp::no_delay(true));
      near.reset();
      far.reset();
      near.emplace(Socket(loop.get_executor(), ip::tcp::v4(), client.release()), meter);
      far.emplace(Socket(loop.get_executor(), ip::tcp::v4(), server.release()), meter);
    }
    if (kind != Kind::Tls12 && kind != Kind::Tls13) return;
    near->start_tls(kind == Kind::Tls12 ? contexts().client12.get() : contexts().client.get(), false);
    far->start_tls(contexts().server.get(), true);
    EXPECT_TRUE(test::shake(*near, *far)) << near->tls_error() << far->tls_error();
    EXPECT_EQ(SSL_version(near->ssl()), kind == Kind::Tls12 ? TLS1_2_VERSION : TLS1_3_VERSION);
  }
};

class Transports : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Each, Transports, testing::Values(Kind::Unix, Kind::Tcp, Kind::Tls12, Kind::Tls13),
                         [](const auto& row) { return kNames[static_cast<std::size_t>(row.param)]; });

/// What arrives within a moment: TCP's loopback takes a while.
std::string arrived(Transport& transport, std::size_t size) {
  std::string out;
  for (int i = 0; i < 2000 && out.size() < size; ++i) {
    out += read_all(transport);
    if (out.size() < size) ::usleep(500);
  }
  return out;
}

TEST_P(Transports, MovesBytesBothWays) {
  Link link(GetParam());
  EXPECT_EQ(read_all(*link.far), "");
  const IoResult sent = test::write(*link.near, {"hello", "", " ", "world"});
  EXPECT_EQ(sent.status, IoStatus::Ok);
  EXPECT_EQ(sent.bytes, 11u);
  EXPECT_EQ(arrived(*link.far, 11), "hello world");
  EXPECT_EQ(test::write(*link.far, {"back"}).bytes, 4u);
  EXPECT_EQ(arrived(*link.near, 4), "back");
}

TEST_P(Transports, ItsSystemCallsAreCounted) {
  Link link(GetParam());
  test::read_all(*link.near);  // tickets
  const pool::LoopCounters before = link.meter.counters;
  test::write(*link.near, {"some", "thing"});
  EXPECT_EQ(link.meter.counters.sends, before.sends + 1) << "one for all pieces";
  EXPECT_EQ(arrived(*link.far, 9), "something");
  EXPECT_GE(link.meter.counters.receives, before.receives + 1);
  const bool tls = link.near->is_tls();
  EXPECT_EQ(link.meter.counters.clientHandshakes.full, tls ? 1u : 0u);
  EXPECT_EQ(link.meter.counters.serverHandshakes.full, tls ? 1u : 0u);
}

TEST_P(Transports, NothingToWriteIsOk) {
  Link link(GetParam());
  for (const std::vector<std::string>& nothing : {std::vector<std::string>{}, {""}, {"", ""}}) {
    const IoResult sent = test::write(*link.near, nothing);
    EXPECT_EQ(sent.status, IoStatus::Ok);
    EXPECT_EQ(sent.bytes, 0u);
  }
}

TEST_P(Transports, ManyPieces) {
  for (const std::size_t count : {63, 64, 65, 128, 129, 1000}) {
    Link link(GetParam());
    std::vector<std::string> pieces;
    std::string all;
    for (std::size_t i = 0; i < count; ++i) {
      pieces.push_back(pattern(i % 37));
      all += pieces.back();
    }
    const IoResult sent = test::write(*link.near, pieces);
    EXPECT_EQ(sent.status, IoStatus::Ok) << count;
    EXPECT_EQ(sent.bytes, all.size());
    EXPECT_EQ(arrived(*link.far, all.size()), all) << count;
  }
}

// Pieces larger and smaller than a record, of which the kernel takes what it has room for.
TEST_P(Transports, AFullKernelTakesAPart) {
  Link link(GetParam());
  std::vector<std::string> pieces;
  std::string all;
  for (int i = 0; i < 400; ++i) {
    pieces.push_back(pattern(i % 3 == 0 ? 20'000 : i % 3 == 1 ? 5 : 16 * 1024));
    all += pieces.back();
  }
  std::size_t sent = 0;
  bool full = false;
  std::string got;
  while (sent < all.size()) {
    const IoResult result = test::write(*link.near, pieces, sent);
    sent += result.bytes;
    full |= result.status == IoStatus::WouldBlock;
    ASSERT_TRUE(result.status == IoStatus::WouldBlock || sent == all.size());
    if (link.near->is_tls() && result.status == IoStatus::WouldBlock) {
      EXPECT_TRUE(link.near->wants_write());
    }
    got += read_all(*link.far, nullptr, 10'000);
  }
  got += arrived(*link.far, all.size() - got.size());
  EXPECT_TRUE(full);
  EXPECT_TRUE(got == all);
}

TEST(Transport, EveryPartialWriteOfManyPieces) {
  std::vector<std::string> pieces;
  std::string all;
  for (std::size_t i = 0; i < 130; ++i) {
    pieces.push_back(pattern(i % 4));
    all += pieces.back();
  }
  for (std::size_t budget = 0; budget <= all.size(); ++budget) {
    Pair pair;
    test::g_send_budget = static_cast<long>(budget);
    const IoResult part = test::write(*pair.near, pieces);
    test::g_send_budget = -1;
    EXPECT_EQ(part.bytes, budget);
    EXPECT_EQ(part.status, budget < all.size() ? IoStatus::WouldBlock : IoStatus::Ok);
    const IoResult rest = test::write(*pair.near, pieces, budget);
    EXPECT_EQ(rest.status, IoStatus::Ok);
    EXPECT_EQ(rest.bytes, all.size() - budget);
    EXPECT_EQ(read_all(*pair.far), all);
  }
}

// A reader that waits for readability while OpenSSL holds the rest of a record would wait for ever.
TEST_P(Transports, PendingWhatAReadLeftOfARecord) {
  Link link(GetParam());
  const std::string text = pattern(1000);
  test::write(*link.near, {text});
  std::string got;
  std::vector<std::uint8_t> exact(7);
  for (int i = 0; i < 10'000 && got.size() < text.size(); ++i) {
    const IoResult result = link.far->read(exact);
    got.append(reinterpret_cast<const char*>(exact.data()), result.bytes);
    if (link.far->is_tls() && result.status == IoStatus::Ok) {
      EXPECT_EQ(link.far->pending(), got.size() < text.size()) << got.size();
    }
  }
  EXPECT_EQ(got, text);
  EXPECT_FALSE(link.far->pending());
}

TEST_P(Transports, AFullBufferOfSeveralRecords) {
  Link link(GetParam());
  const std::string text = pattern(50'000);
  std::size_t sent = 0;
  std::string got;
  while (sent < text.size()) {
    sent += test::write(*link.near, {text}, sent).bytes;
    got += read_all(*link.far, nullptr, 40'000);
  }
  got += arrived(*link.far, text.size() - got.size());
  EXPECT_EQ(got, text);
}

/// Waits, and counts how often that was over.
struct Waiting {
  struct Session : std::enable_shared_from_this<Session> {
    void on_readiness(const boost::system::error_code& ec) { over += !ec; }
    Readiness<Session> readiness{*this};
    int over = 0;
  };
  explicit Waiting(Link& on) : link(on) {}
  void wait(bool for_end = false) {
    EXPECT_FALSE(session->readiness.pending());
    link.far->wait_readable(for_end, session->readiness);
  }
  int run() {
    link.loop.restart();
    link.loop.run_for(std::chrono::milliseconds(20));
    return std::exchange(session->over, 0);
  }
  Link& link;
  std::shared_ptr<Session> session = std::make_shared<Session>();
};

TEST_P(Transports, AWaitKeepsItsSessionUntilItIsOver) {
  Link link(GetParam());
  std::weak_ptr<Waiting::Session> session;
  {
    Waiting waiting(link);
    session = waiting.session;
    waiting.wait();
  }
  EXPECT_FALSE(session.expired());
  EXPECT_TRUE(session.lock()->readiness.pending());
  link.far->close();
  link.loop.run_for(std::chrono::milliseconds(20));
  EXPECT_TRUE(session.expired());
}

TEST_P(Transports, AWaitAfterAReadThatLeftNothingMakesNoSystemCall) {
  Link link(GetParam());
  Waiting waiting(link);
  const std::uint64_t& waits = link.meter.counters.waits;
  waiting.wait();
  EXPECT_EQ(waits, 1u);
  for (int round = 0; round < 5; ++round) {
    test::write(*link.near, {"to wake it"});
    EXPECT_EQ(waiting.run(), 1);
    EXPECT_EQ(arrived(*link.far, 10), "to wake it");
    const std::uint64_t before = waits;
    waiting.wait();
    EXPECT_EQ(waits, before) << round;
    if (waiting.run() > 0) {  // Asio had heard of something that has been read since
      EXPECT_EQ(round, 0);
      EXPECT_EQ(read_all(*link.far), "");
      waiting.wait();
    }
    EXPECT_EQ(waiting.run(), 0);
  }
  test::write(*link.near, {"one"});
  EXPECT_EQ(waiting.run(), 1);
  EXPECT_EQ(arrived(*link.far, 3), "one");
  test::write(*link.near, {"before it waits"});
  ::usleep(1000);
  waiting.wait();
  EXPECT_EQ(waiting.run(), 1) << "of what came while nobody waited";
  EXPECT_EQ(link.far->read(std::span(test::scratch()).first(3)).bytes, 3u);
  if (!link.far->is_tls()) {
    const std::uint64_t before = waits;
    waiting.wait();
    EXPECT_EQ(waits, before + 1) << "since there is more";
    EXPECT_EQ(waiting.run(), 1);
  }
}

TEST_P(Transports, AnEndThatComesWithTheLastBytesIsMissedUnlessAskedFor) {
  for (const bool reset : {false, true}) {
    for (const bool for_end : {false, true}) {
      Link link(GetParam());
      read_all(*link.near);  // tickets: a close with something unread is a reset
      Waiting waiting(link);
      for (int spent = 0; spent < 2; ++spent) {
        test::write(*link.near, {"first"});
        waiting.wait();
        EXPECT_EQ(waiting.run(), 1);
        EXPECT_EQ(arrived(*link.far, 5), "first");
      }
      waiting.wait();
      EXPECT_EQ(waiting.run(), 0);
      EXPECT_TRUE(link.far->may_miss());
      EXPECT_FALSE(link.far->has_missed());
      EXPECT_TRUE(link.far->may_miss()) << "not looked yet";
      EXPECT_FALSE(link.far->has_missed());
      EXPECT_FALSE(link.far->may_miss()) << "looked once, nothing can be missed any more";
      test::write(*link.near, {"last"});
      const linger at_once{.l_onoff = reset, .l_linger = 0};
      ::setsockopt(link.near->socket().native_handle(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
      link.near->close();
      ::usleep(1000);
      EXPECT_EQ(waiting.run(), 1);
      EXPECT_EQ(link.far->read(test::scratch()).bytes, 4u);
      waiting.wait(for_end);
      EXPECT_EQ(waiting.run(), for_end ? 1 : 0);
      EXPECT_FALSE(link.far->has_missed());
      EXPECT_EQ(link.far->has_missed(), !for_end);
      EXPECT_EQ(link.far->has_missed(), !for_end) << "until it is read";
      IoStatus last{};
      EXPECT_EQ(read_all(*link.far, &last), "");
      EXPECT_TRUE(last == IoStatus::Eof || (reset && last == IoStatus::Error));
    }
  }
}

TEST_P(Transports, AHalfCloseIsTheEndAfterWhatWasSent) {
  Link link(GetParam());
  test::write(*link.near, {"last"});
  link.near->shutdown_send();
  EXPECT_EQ(arrived(*link.far, 4), "last");
  IoStatus last{};
  for (int i = 0; i < 1000 && (last == IoStatus::Ok || last == IoStatus::WouldBlock); ++i) {
    EXPECT_EQ(read_all(*link.far, &last), "");
    if (last == IoStatus::WouldBlock) ::usleep(500);
  }
  EXPECT_EQ(last, IoStatus::Eof);
  EXPECT_EQ(test::write(*link.far, {"still heard"}).status, IoStatus::Ok);  // the other half is open
  EXPECT_EQ(arrived(*link.near, 11), "still heard");
}

// Without close_notify, as a killed server ends: PostgreSQL's messages say where they end, so this is an end too.
TEST_P(Transports, ACloseIsTheEnd) {
  Link link(GetParam());
  ::shutdown(link.near->socket().native_handle(), SHUT_RDWR);
  IoStatus last{};
  for (int i = 0; i < 1000 && (last == IoStatus::Ok || last == IoStatus::WouldBlock); ++i) {
    read_all(*link.far, &last);
    if (last == IoStatus::WouldBlock) ::usleep(500);
  }
  EXPECT_EQ(last, IoStatus::Eof);
}

TEST_P(Transports, WritingToOneThatIsGoneFails) {
  Link link(GetParam());
  link.far->close();
  IoResult result;
  for (int i = 0; i < 1000 && result.status == IoStatus::Ok; ++i) {
    result = test::write(*link.near, {"x"});
    ::usleep(200);
  }
  EXPECT_EQ(result.status, IoStatus::Error);
}

TEST_P(Transports, AClosedOneAnswersWithErrors) {
  Link link(GetParam());
  link.near->close();
  link.near->close();
  link.near->shutdown_send();
  EXPECT_FALSE(link.near->pending());
  std::vector<std::uint8_t> exact(8);
  EXPECT_EQ(link.near->read(exact).status, IoStatus::Error);
  EXPECT_EQ(test::write(*link.near, {"x"}).status, IoStatus::Error);
  EXPECT_EQ(link.near->handshake().status, IoStatus::Error);
}

TEST(Transport, WhatIsNotTlsFailsTheHandshakeAndTheRead) {
  {
    Pair pair;
    pair.far->start_tls(contexts().server.get(), true);
    test::write(*pair.near, {"GET / HTTP/1.1\r\n\r\n"});
    EXPECT_EQ(pair.far->handshake().status, IoStatus::Error);
    EXPECT_FALSE(pair.far->tls_error().empty());
  }
  Link link(Kind::Tls13);
  const std::string rubbish = pattern(100);
  ASSERT_EQ(::write(link.near->socket().native_handle(), rubbish.data(), rubbish.size()), 100);
  IoStatus last{};
  EXPECT_EQ(read_all(*link.far, &last), "");
  EXPECT_EQ(last, IoStatus::Error);
}

TEST(Transport, AHandshakeThatIsCutOff) {
  Pair pair;
  pair.near->start_tls(contexts().client.get(), false);
  EXPECT_EQ(pair.near->handshake().status, IoStatus::WouldBlock);
  EXPECT_FALSE(pair.near->wants_write());
  pair.far->close();
  EXPECT_NE(pair.near->handshake().status, IoStatus::WouldBlock);
  EXPECT_EQ(pair.near->tls_error(), "connection closed during the TLS handshake");
}

}  // namespace
}  // namespace pgsidecar::proxy
