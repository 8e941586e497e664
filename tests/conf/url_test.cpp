#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>

#include "tests/conf/support.hpp"

namespace pgsidecar::conf {
namespace {

ConnectParams parse(std::string_view text, std::map<std::string, std::string> env = {}) {
  return parse_connection_string(text, {}, environment(std::move(env)));
}

TEST(Url, Accepted) {
  const struct {
    const char* text;
    const char *host, *user, *password, *dbname;
    std::uint16_t port;
  } rows[] = {
      {"postgresql://", "localhost", nullptr, "", nullptr, 5432},
      {"postgres://u@h", "h", "u", "", "u", 5432},
      {"postgresql://u:p@h:1/d", "h", "u", "p", "d", 1},
      {"postgresql://u:p%40%2F%25@h/d", "h", "u", "p@/%", "d", 5432},
      {"postgresql://u:p@ss@h/d", "h", "u", "p@ss", "d", 5432},  // node-postgres' reading
      {"postgresql://u:7?p=q@h/d?sslmode=disable", "h", "u", "7?p=q", "d", 5432},
      {"postgresql://u:p@h?user=a@b", "h", "a@b", "p", "a@b", 5432},
      {"postgresql://u@[::1]:6000/d", "::1", "u", "", "d", 6000},
      {"postgresql://%2Fvar%2Frun/d?user=x", "/var/run", "x", "", "d", 5432},
      {"postgresql:///d?host=a&port=7&user=x&password=q", "a", "x", "q", "d", 7},
      {"postgresql://u@h/d?", "h", "u", "", "d", 5432},
      {"host=h port=9 user=u password='a b\\'c' dbname=d", "h", "u", "a b'c", "d", 9},
      {"host = h  user = u", "h", "u", "", "u", 5432},
      {"postgresql://u@h?dbname=x", "h", "u", "", "x", 5432},
  };
  for (const auto& row : rows) {
    const ConnectParams p = parse(row.text);
    EXPECT_EQ(p.hosts.at(0).name, row.host) << row.text;
    EXPECT_EQ(p.hosts.at(0).port, row.port) << row.text;
    EXPECT_TRUE(!row.user || p.user == row.user) << row.text;
    EXPECT_EQ(p.password, row.password) << row.text;
    EXPECT_TRUE(!row.dbname || p.dbname == row.dbname) << row.text;
  }
}

TEST(Url, SeveralHosts) {
  const ConnectParams p = parse("postgresql://u@a:1,b,[::2]:3/d?target_session_attrs=read-write");
  ASSERT_EQ(p.hosts.size(), 3u);
  EXPECT_EQ(p.hosts[0].port, 1);
  EXPECT_EQ(p.hosts[1].name, "b");
  EXPECT_EQ(p.hosts[1].port, 5432);
  EXPECT_EQ(p.hosts[2].name, "::2");
  EXPECT_EQ(p.hosts[2].port, 3);
  EXPECT_EQ(p.targetSessionAttrs, TargetSessionAttrs::ReadWrite);
  EXPECT_EQ(parse("host=a,b port=5").hosts[1].port, 5);
  EXPECT_EQ(parse("host=a,b,c hostaddr=192.0.2.1,fe80::1%lo,").hosts[1].address, "fe80::1%lo");
}

TEST(Url, Refused) {
  const struct {
    const char *text, *says;
  } rows[] = {
      {"postgresql://u:%4@h/d", "percent-encoding"},
      {"postgresql://u:%@h/d", "percent-encoding"},
      {"postgresql://u:%zz@h/d", "percent-encoding"},
      {"postgresql://u:%00@h/d", "%00"},
      {"postgresql://h:99999/d", "port"},
      {"postgresql://h:x/d", "port"},
      {"postgresql://[::1/d", "]"},
      {"postgresql://[]/d", "IPv6"},
      {"postgresql://h/d?sslmod=require", "\"sslmode\""},
      {"postgresql://h/d?sslmode=required", "\"require\""},
      {"postgresql://h/d?x", "separator"},
      {"postgresql://a:1,b:2,c/d?port=1,2", "2 port numbers, but 3 hosts"},
      {"host", "="},
      {"host='a", "unterminated"},
      {"mysql://h/d", "scheme \"mysql://\""},
      {"postgresql://h/d?requirepeer=postgres", "not supported"},
      {"postgresql://h/d?gssencmode=require", "not supported"},
      {"postgresql://h/d?gssencmode=dis", "not supported"},
      {"postgresql://h/d?sslcertmode=require", "needs TLS and sslcert"},
      {"postgresql://h/d?sslmode=disable&sslcert=c&sslkey=k&sslcertmode=require", "needs TLS and sslcert"},
      {"postgresql://h/d?sslcertmode=never", "not supported"},
      {"postgresql://h/d?colour=red&sslmod=require", "\"colour\""},
      {"postgresql://h/d?colour=red&sslmod=require", "\"sslmode\""},
      {"host=h port=0", "port number: \"0\""},
      {"host=h port=-1", "port number: \"-1\""},
      {"host=h keepalives_idle=+-1", "invalid integer"},
      {"host=h keepalives_idle='1 2'", "invalid integer"},
      {"host=h keepalives=on", "invalid integer"},
      {"host=h hostaddr=1.2.3.4.5", "hostaddr \"1.2.3.4.5\" is not an IP address"},
      {"host=h,i hostaddr=::1,localhost", "hostaddr \"localhost\" is not an IP address"},
      {"postgresql://h/d?load_balance_hosts=rand", "\"random\""},
      {"postgresql://h/d?require_auth=md", "\"md5\""},
      {"postgresql://h/d?require_auth=md5,!none", "mixed"},
      {"postgresql://h/d?ssl_min_protocol_version=TLSv1.9", "did you mean \"TLSv1.1\"?"},
      {"postgresql://h/d?ssl_min_protocol_version=tlsv1.3&ssl_max_protocol_version=TLSv1.2", "below"},
      {"postgresql://h/d?sslrootcert=system&sslmode=require", "weak"},
      {"postgresql://localhost/d?sslnegotiation=direct", "weak"},
  };
  for (const auto& row : rows) {
    const std::string text = mistake([&] { parse(row.text); });
    EXPECT_NE(text.find(row.says), std::string::npos) << row.text << " -> " << text;
  }
}

TEST(Url, NumbersAsLibpqReadsThem) {
  const ConnectParams p = parse("host=h port=' 5433 ' connect_timeout=+7 keepalives=2 keepalives_idle=-5 keepalives_count=' +3'");
  EXPECT_EQ(p.hosts[0].port, 5433);
  EXPECT_EQ(p.connectTimeoutMillis, 7000u);
  EXPECT_EQ(p.keepalives, true);
  EXPECT_EQ(p.keepalivesIdleSeconds, 0u);
  EXPECT_EQ(p.keepalivesCount, 3u);
  EXPECT_EQ(parse("host=h connect_timeout=-1").connectTimeoutMillis, 0u);
}

TEST(Url, RevocationLists) {
  EXPECT_EQ(parse("host=h sslcrldir=/crls").sslcrldir, "/crls");
  EXPECT_TRUE(parse("host=h sslcrldir=/crls").warnings.empty());
  EXPECT_TRUE(parse("host=h sslcert=c sslkey=k sslcertmode=require").sslcertRequired);
}

TEST(Url, OtherPoolersAreWarnedOf) {
  const struct {
    const char *text, *instead;
  } rows[] = {
      {"postgresql://u@ep-cool-name-123-pooler.eu-central-1.aws.neon.tech/d", "\"ep-cool-name-123.eu-central-1.aws.neon.tech\""},
      {"postgresql://postgres.ref@aws-0-eu.pooler.supabase.com:6543/d", "port 5432"},
      {"postgresql://postgres.ref@aws-0-eu.pooler.supabase.com:5432/d", nullptr},
      {"postgresql://u@ep-cool-name-123.eu-central-1.aws.neon.tech/d", nullptr},
      {"postgresql://u@my-pooler/d", nullptr},
  };
  for (const auto& row : rows) {
    const ConnectParams p = parse(row.text);
    ASSERT_EQ(p.warnings.size(), row.instead ? 1u : 0u) << row.text;
    EXPECT_TRUE(!row.instead || p.warnings[0].find(row.instead) != std::string::npos) << p.warnings[0];
  }
}

TEST(Url, WhatOtherClientsReadIsIgnoredWithAWarning) {
  const ConnectParams p =
      parse("postgresql://u@localhost/d?pgbouncer=true&connection_limit=5&pool_timeout=3&schema=public&uselibpqcompat=true");
  EXPECT_EQ(p.warnings.size(), 5u);
  for (const std::string& warning : p.warnings) EXPECT_NE(warning.find("is ignored"), std::string::npos) << warning;
}

TEST(Url, MistakesDoNotTellThePassword) {
  for (const char* text :
       {"postgresql://u:hunter2@h:x/d", "postgresql://u:hunter2%@h/d", "host=h password=hunter2 port=x", "postgresql://u:hunter2@h/d?no=1",
        "postgresql+asyncpg://u:hunter2@h/d?ssl=require", "//u:hunter2@h/d?x=1", "postgresql://u:7?hunter2@h/d?no=1",
        "postgresql://u:7/hunter2@h/d", "postgresql://u:7?hunter2=/x@h/d", "postgresql://u:7?sslmode=hunter2/@h/d",
        "postgresql://u:7?connect_timeout=hunter2/@h/d", "postgresql://u:hunter2/x@h/d", "host=h password=a hunter2=b"})
    EXPECT_EQ(mistake([&] { parse(text); }).find("hunter2"), std::string::npos) << text;
}

TEST(Url, SslmodeByDefault) {
  EXPECT_EQ(parse("postgresql://u@db.example.com/d").sslmode, SslMode::VerifyFull);
  for (const char* local : {"postgresql://u@localhost/d", "postgresql://u@127.0.0.1/d", "postgresql://u@[::1]/d", "host=/tmp"})
    EXPECT_EQ(parse(local).sslmode, SslMode::Prefer) << local;
  EXPECT_EQ(parse("postgresql://u@127.example.com/d").sslmode, SslMode::VerifyFull);
  EXPECT_EQ(parse("postgresql://u@h/d?sslmode=no-verify").sslmode, SslMode::Require);
  EXPECT_EQ(parse("postgresql://u@h/d", {{"PGSSLMODE", "disable"}}).sslmode, SslMode::Disable);
}

TEST(Url, EnvironmentFillsWhatTheUrlLeavesOut) {
  const ConnectParams p = parse("postgresql://h/d", {{"PGUSER", "e"}, {"PGPASSWORD", "pw"}, {"PGHOST", "other"}, {"PGPORT", "77"}});
  EXPECT_EQ(p.hosts[0].name, "h");
  EXPECT_EQ(p.hosts[0].port, 77);
  EXPECT_EQ(p.user, "e");
  EXPECT_EQ(p.password, "pw");
}

TEST(Url, ProtectionThatTheEnvironmentAsksForIsNotIgnored) {
  const struct { const char *variable, *value; } rows[] = {{"PGGSSENCMODE", "require"}, {"PGREQUIREPEER", "postgres"}};
  for (const auto& row : rows)
    EXPECT_NE(mistake([&] {
                parse("postgresql://h/d", {{row.variable, row.value}});
              }).find("not supported"),
              std::string::npos)
        << row.variable;
  EXPECT_EQ(parse("postgresql://h/d", {{"PGSSLCRLDIR", "/crls"}}).sslcrldir, "/crls");
  EXPECT_NE(mistake([] { parse("postgresql://h/d", {{"PGSSLCERTMODE", "require"}}); }).find("needs TLS and sslcert"), std::string::npos);
  EXPECT_TRUE(parse("postgresql://h/d", {{"PGGSSENCMODE", "prefer"}, {"PGKRBSRVNAME", "x"}}).warnings.empty());
  EXPECT_EQ(parse("postgresql://localhost/d", {{"PGREQUIRESSL", "1"}}).sslmode, SslMode::Require);
  EXPECT_EQ(parse("postgresql://localhost/d?sslmode=disable", {{"PGREQUIRESSL", "1"}}).sslmode, SslMode::Disable);
}

TEST(Url, FilesOfTheHomeDirectory) {
  const std::string home = testing::TempDir() + "pgsidecar_home", files = home + "/.postgresql/";
  std::filesystem::create_directories(files);
  EXPECT_EQ(parse("postgresql://h/d", {{"HOME", home}}).sslrootcert, "");
  for (const char* name : {"root.crt", "root.crl", "postgresql.crt", "postgresql.key"}) std::ofstream(files + name) << "x";
  const ConnectParams usual = parse("postgresql://h/d", {{"HOME", home}});
  EXPECT_EQ(usual.sslrootcert, files + "root.crt");
  EXPECT_EQ(usual.sslcrl, files + "root.crl");
  EXPECT_EQ(usual.sslcert, files + "postgresql.crt");
  EXPECT_EQ(usual.sslkey, files + "postgresql.key");
  const ConnectParams named = parse("postgresql://h/d?sslrootcert=system&sslcert=/c&sslkey=/k", {{"HOME", home}});
  EXPECT_EQ(named.sslrootcert, "system");
  EXPECT_EQ(named.sslcert, "/c");
  EXPECT_EQ(named.sslkey, "/k");
  const ConnectParams without = parse("postgresql://h/d?sslmode=disable&sslrootcert=/none", {{"HOME", home}});
  EXPECT_EQ(without.sslrootcert + without.sslcrl + without.sslcert + without.sslkey, "");
  std::filesystem::remove_all(home);
}

TEST(Url, Passfile) {
  const std::string file = testing::TempDir() + "pgsidecar_passfile";
  std::ofstream(file) << "# comment\nother:*:*:*:no\nh:5432:*:u:a\\:b\n";
  std::remove((file + "x").c_str());
  ASSERT_EQ(::chmod(file.c_str(), 0600), 0);
  EXPECT_EQ(parse("postgresql://u@h/d?passfile=" + file).users_password(), "a:b");
  EXPECT_EQ(parse("postgresql://v@h/d?passfile=" + file).password, "");
  std::ofstream(file) << "other:*:*:*:no\nh:5432:*:u:a\\:b\n";
  const ConnectParams two = parse("postgresql://u@h,other,third/d?passfile=" + file);
  EXPECT_EQ(two.hosts[0].password, "a:b");
  EXPECT_EQ(two.hosts[1].password, "no");
  EXPECT_EQ(two.hosts[2].password, "");
  EXPECT_EQ(two.password, "");  // no host gets another's
  std::ofstream(file) << "localhost:*:*:*:usual\n/run/db:*:*:*:own\r\n";
  EXPECT_EQ(parse("host=/var/run/postgresql passfile=" + file).users_password(), "usual");
  EXPECT_EQ(parse("host=/run/db passfile=" + file).users_password(), "own");
  EXPECT_EQ(parse("host=/run/other passfile=" + file).users_password(), "");
  ASSERT_EQ(::chmod(file.c_str(), 0644), 0);
  EXPECT_EQ(parse("postgresql://u@h/d?passfile=" + file).users_password(), "");
  std::remove(file.c_str());
}

TEST(Url, Service) {
  const std::string file = testing::TempDir() + "pgsidecar_service";
  std::ofstream(file) << "[other]\nhost=no\n# comment\n[mine]\nhost = h\n";
  EXPECT_NE(mistake([&] { parse("service=mine servicefile=" + file); }).find("line 5"), std::string::npos);
  std::ofstream(file) << "[other]\nhost=no\n# comment\n[mine]\nhost=h\nuser=u\nport=7\n";
  const ConnectParams p = parse("postgresql://?service=mine&port=8", {{"PGSERVICEFILE", file}, {"PGUSER", "e"}, {"PGDATABASE", "d"}});
  EXPECT_EQ(p.hosts[0].name, "h");
  EXPECT_EQ(p.hosts[0].port, 8);
  EXPECT_EQ(p.user, "u");
  EXPECT_EQ(p.dbname, "d");
  EXPECT_NE(mistake([&] {
              parse("", {{"PGSERVICE", "none"}, {"PGSERVICEFILE", file}, {"PGSYSCONFDIR", "/no/such"}});
            }).find("\"none\" not found"),
            std::string::npos);
  std::remove(file.c_str());
}

}  // namespace
}  // namespace pgsidecar::conf
