#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "conf/http_url.hpp"
#include "conf/load.hpp"
#include "conf/schema.hpp"
#include "tests/conf/support.hpp"

namespace pgsidecar::conf {
namespace {

const Environment kUrl = environment({{"DATABASE_URL", "postgresql://app:s3cret@db.example.com/shop"}});

TEST(Load, NothingIsDefaults) {
  const Config config = load_text("", "x", kUrl);
  EXPECT_EQ(config, Config{});
}

TEST(Load, TheExampleIsTheDefaults) {
  const Config example = load(std::string(PGSIDECAR_SOURCE_DIR) + "/conf/pgsidecar.yaml", kUrl);
  for (const auto& key : config_keys()) EXPECT_EQ(key.get(example), key.get(Config{})) << key.path;
  EXPECT_EQ(example, Config{});
  std::ifstream in(std::string(PGSIDECAR_SOURCE_DIR) + "/conf/pgsidecar.yaml");
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  for (const auto& key : config_keys()) {
    const std::string_view name = key.path.substr(key.path.rfind('.') + 1);
    EXPECT_NE(text.find(std::string(name) + ":"), std::string::npos) << key.path << " is missing in the example";
  }
}

TEST(Load, FileThenEnvironment) {
  const auto env =
      environment({{"DATABASE_URL", "postgresql://u@h/d"}, {"PGSIDECAR_POOL_MAX", "7"}, {"PGSIDECAR_POOL_IDLE_TIMEOUT_MILLIS", "5"}});
  const Config config = load_text("pool: {max: 3, min: 1, mode: session}\nlisten: ['127.0.0.1:1', 'unix:/tmp']\n", "x", env);
  EXPECT_EQ(config.pool.max, 7u);
  EXPECT_EQ(config.pool.min, 1u);
  EXPECT_EQ(config.pool.idleTimeoutMillis, 5u);
  EXPECT_EQ(config.pool.mode, PoolMode::Session);
  ASSERT_EQ(config.listen.size(), 2u);
  EXPECT_EQ(config.listen[1].directory, "/tmp");
  EXPECT_EQ(config.listen[1].port, 1);
}

TEST(Load, SectionsTakeWhatTheyLeaveOutFromTheGlobalOnes) {
  const Config config =
      load_text("databases: {a: {pool: {max: 4}}, '*': {}}\nusers: {x: {password: pw, pool: {min: 0}}}\npool: {maxUses: 9}\n", "x", kUrl);
  EXPECT_EQ(config.databases.at("a").pool.max, 4u);
  EXPECT_EQ(config.databases.at("a").pool.maxUses, 9u);
  EXPECT_EQ(config.databases.at("a").upstream.keys.at("dbname"), "a");
  const PoolSettings settings = overlay(config.databases.at("a").pool, config.users.at("x").pool);
  EXPECT_EQ(settings.max, 4u) << "the database's";
  EXPECT_EQ(settings.min, 0u) << "the user's";
  EXPECT_EQ(settings.maxUses, 9u);
}

TEST(Load, TheEnvironmentReachesTheSections) {
  const auto env = environment({{"PGSIDECAR_UPSTREAM_URL", "postgresql://e:s3cret@other/x"},
                                {"PGSIDECAR_POOL_MAX", "4"},
                                {"PGSIDECAR_UPSTREAM_SSLMODE", "require"}});
  const Config config =
      load_text("upstream: {url: postgresql://u@h/d}\npool: {max: 20}\ndatabases: {a: {}}\nusers: {u: {pool: {min: 1}}}\n", "x", env);
  EXPECT_EQ(config.databases.at("a").pool.max, 4u);
  EXPECT_EQ(overlay(config.pool, config.users.at("u").pool).max, 4u);
  const ConnectParams p = resolve_upstream(config.databases.at("a").upstream, env);
  EXPECT_EQ(p.hosts[0].name, "other");
  EXPECT_EQ(p.dbname, "a");
  EXPECT_EQ(p.sslmode, SslMode::Require);
}

TEST(Load, ASectionsUpstreamIsTheGlobalOneOverlaid) {
  const Config config = load_text(
      "upstream: {url: 'postgresql://app:pw@h:7/d', sslmode: require, password: other}\n"
      "databases:\n  a: {upstream: {host: replica}}\n  b: {upstream: {url: 'postgresql://z:q@own/'}}\n  c: {upstream: {dbname: "
      "elsewhere}}\n"
      "  d: {upstream: 'postgresql://z@own/named'}\n",
      "x", kUrl);
  const auto resolved = [&](const char* name) { return resolve_upstream(config.databases.at(name).upstream, kUrl); };
  EXPECT_EQ(resolved("a").hosts[0].name, "replica");
  EXPECT_EQ(resolved("a").user, "app");
  EXPECT_EQ(resolved("a").dbname, "a");
  EXPECT_EQ(resolved("b").password, "q");
  EXPECT_EQ(resolved("b").dbname, "b");
  EXPECT_EQ(resolved("b").sslmode, SslMode::VerifyFull);
  EXPECT_EQ(resolved("c").dbname, "elsewhere");
  EXPECT_EQ(resolved("d").dbname, "named");
}

TEST(Load, KeysBesideTheUpstream) {
  const char* yaml =
      "upstream: {url: 'postgresql://app:pw@h/d', suspendAfterSeconds: 300, passwordCacheSeconds: 60, passwordCommand: [/bin/echo, 'a,b', "
      "'${file:/etc/hostname}']}\n"
      "databases:\n  same: {upstream: {passwordCacheSeconds: 5}}\n  other: {upstream: {url: 'postgresql://z:q@own/'}}\n"
      "  off: {upstream: {passwordCommand: []}}\n";
  const Config config = load_text(yaml, "x", kUrl);
  const std::vector<std::string> command{"/bin/echo", "a,b", "${file:/etc/hostname}"};
  EXPECT_EQ(config.upstream.passwordCommand, command);
  EXPECT_EQ(config.upstream.suspendAfterSeconds, 300u);
  EXPECT_EQ(config.databases.at("same").upstream.passwordCommand, command);
  EXPECT_EQ(config.databases.at("same").upstream.suspendAfterSeconds, 300u);
  EXPECT_EQ(config.databases.at("same").upstream.passwordCacheSeconds, 5u);
  EXPECT_TRUE(config.databases.at("off").upstream.passwordCommand.empty());
  EXPECT_EQ(config.databases.at("other").upstream.passwordCacheSeconds, 600u);
  EXPECT_TRUE(config.databases.at("other").upstream.passwordCommand.empty());
  const std::string shown = to_redacted_yaml(config, kUrl);
  EXPECT_NE(shown.find("passwordCommand: [/bin/echo, \"***\", \"***\"]"), std::string::npos) << shown;
  EXPECT_EQ(shown.find("a,b"), std::string::npos);
}

TEST(Load, VariablesThatAreNoSettings) {
  const std::string file = testing::TempDir() + "variables.yaml";
  std::ofstream(file) << "upstream: {url: \"postgresql://u:${PGSIDECAR_SECRET}@h/d\"}\n";
  const Environment env = environment({{"PGSIDECAR_SECRET", "s"}, {"PGSIDECAR_POOL_MAX", "3"}});
  const char* const variables[] = {"PATH=/bin",
                                   "PGSIDECAR_SECRET=s",
                                   "PGSIDECAR_POOL_MAX=3",
                                   "PGSIDECAR_CONFIG=x.yaml",
                                   "PGSIDECAR_UPSTREAM_SSLMODE=require",
                                   "PGSIDECAR_POOL_MAXUSE=9",
                                   "PGSIDECAR_SERVICE_HOST=10.0.0.1",
                                   "PGSIDECAR_SERVICE_PORT_SQL=6432",
                                   "PGSIDECAR_PORT=tcp://10.0.0.1:6432",
                                   "PGSIDECAR_PORT_6432_TCP_ADDR=10.0.0.1",
                                   "PGSIDECAR_ADMIN_PORT=9090",
                                   "PGSIDECAR_USERS_APP_PASSWORD=x",
                                   nullptr};
  std::set<std::string, std::less<>> asked;
  load(file, noting(env, asked));
  EXPECT_EQ(unused_variables(asked, variables),
            (std::vector<std::string>{
                "the environment variable PGSIDECAR_POOL_MAXUSE is no setting and is ignored (did you mean \"PGSIDECAR_POOL_MAX_USES\"?)",
                "the environment variable PGSIDECAR_ADMIN_PORT is no setting and is ignored (did you mean \"PGSIDECAR_ADMIN_HOSTS\"?)",
                "the environment variable PGSIDECAR_USERS_APP_PASSWORD is no setting and is ignored"}));
}

TEST(Load, APasswordCommandOfTheEnvironment) {
  const auto with = [](const char* command) {
    return load_text("", "x",
                     environment({{"DATABASE_URL", "postgresql://u:p@h/d"},
                                  {"PGSIDECAR_UPSTREAM_PASSWORD_COMMAND", command},
                                  {"PGSIDECAR_UPSTREAM_PASSWORD_CACHE_SECONDS", "7"}}));
  };
  EXPECT_EQ(with("[/bin/echo, 'x y']").upstream.passwordCommand, (std::vector<std::string>{"/bin/echo", "x y"}));
  EXPECT_EQ(with("echo $X | cut -c2").upstream.passwordCommand, (std::vector<std::string>{"/bin/sh", "-c", "echo $X | cut -c2"}));
  EXPECT_EQ(with("echo x").upstream.passwordCacheSeconds, 7u);
  EXPECT_NE(mistake([&] { with("[/bin/echo"); }).find("PGSIDECAR_UPSTREAM_PASSWORD_COMMAND: not a list"), std::string::npos);
}

TEST(Load, ASecretFileInAUrlHoldsThePasswordAsItIs) {
  const std::string file = testing::TempDir() + "pgsidecar_secret";
  std::ofstream(file) << "p@ss/w?rd%41 #\n";
  const auto p = resolve_upstream({"postgresql://u:${file:" + file + "}@h/d?application_name=${A}", {}, {}}, environment({{"A", "x"}}));
  EXPECT_EQ(p.password, "p@ss/w?rd%41 #");
  EXPECT_EQ(p.dbname, "d");
  std::remove(file.c_str());
}

TEST(Load, AllMistakesAtOnceWithTheirLines) {
  const std::string text = mistake([] {
    load_text(
        "pool:\n  maxx: 3\n  mode: sesion\n  max: 0\nlistn: x\nusers: {u: {pasword: x}}\n"
        "upstream:\n  url: postgresql://h/d\n  sslmod: x\ntls: {mode: require}\nlistn: y\n",
        "f.yaml", kUrl);
  });
  for (const char* says :
       {"f.yaml:2: pool.maxx: unknown key (did you mean \"pool.max\"?)", "f.yaml:3: pool.mode", "f.yaml:4: pool.max", "f.yaml:5: listn",
        "\"listen\"", "\"password\"", "f.yaml:9: upstream.sslmod: unknown key (did you mean \"sslmode\"?)",
        "f.yaml:10: tls:", "f.yaml:11: listn: given twice"})
    EXPECT_NE(text.find(says), std::string::npos) << says << "\n" << text;
}

/// All lines, in order.
std::string mistakes_of(const char* yaml, std::map<std::string, std::string> env = {{"DATABASE_URL", "postgresql://u@h/d"}}) {
  return mistake([&] { load_text(yaml, "f", environment(std::move(env))); });
}

TEST(Load, EveryMistakeOfAnUpstreamWhereItWasMade) {
  EXPECT_EQ(mistakes_of("upstream:\n  url: postgresql://app:s3cret@127.0.0.1/app\n  sslmode: bogus\n  target_session_attrs: writable\n"
                        "  port: 99999\n  connect_timeout: 5s\n  channel_binding: maybe\nlog: {level: loud}\n"),
            "f:8: log.level: \"loud\" is none of: trace, debug, info, warn, error, off\n"
            "f:5: upstream.port: invalid integer value \"99999\" for \"port\"\n"
            "f:3: upstream.sslmode: invalid sslmode value \"bogus\"\n"
            "f:7: upstream.channel_binding: invalid channel_binding value \"maybe\"\n"
            "f:6: upstream.connect_timeout: invalid integer value \"5s\" for \"connect_timeout\"\n"
            "f:4: upstream.target_session_attrs: invalid target_session_attrs value \"writable\"");
  EXPECT_EQ(mistakes_of("upstream:\n  url: postgresql://h/d\n  password: ${file:/no/such}\n  sslrootcert: /none\n"),
            "f:3: upstream.password: cannot read file \"/no/such\" named by ${file:}: No such file or directory\n"
            "f:4: upstream.sslrootcert: cannot read sslrootcert \"/none\": No such file or directory");
  EXPECT_EQ(mistakes_of("upstream:\n  url: postgresql://h/d?sslmode=bogus&foo=1\n"),
            "f:2: upstream.url: connection string: unknown parameter \"foo\"\n"
            "f:2: upstream.url: connection string: invalid sslmode value \"bogus\"");
  EXPECT_EQ(mistakes_of("upstream:\n  url: postgresql://h:x/d\n  sslnegotiation: direct\n  sslmode: bogus\n").substr(0, 60),
            "f:2: upstream.url: connection string: the port is not a numb");
  EXPECT_NE(mistakes_of("upstream:\n  url: postgresql://h:x/d\n  sslmode: bogus\n").find("f:3: upstream.sslmode"), std::string::npos);
  EXPECT_EQ(mistakes_of("upstream:\n  url: ${NOPE}\n  sslnegotiation: direct\n"),  // whether that fits depends on the URL
            "f:2: upstream.url: environment variable NOPE is not set (${NOPE:-default} gives a default)");
}

TEST(Load, AMistakeInAVariableNamesTheVariable) {
  EXPECT_EQ(mistakes_of("", {{"DATABASE_URL", "postgresql://h/d?sslmode=x"}, {"PGCONNECT_TIMEOUT", "y"}, {"PGSIDECAR_UPSTREAM_PORT", "z"}}),
            "PGSIDECAR_UPSTREAM_PORT: invalid integer value \"z\" for \"port\"\n"
            "DATABASE_URL: connection string: invalid sslmode value \"x\"\n"
            "PGCONNECT_TIMEOUT: invalid integer value \"y\" for \"connect_timeout\"");
  EXPECT_EQ(mistakes_of("upstream: {url: 'postgresql://h/d'}", {{"PGSIDECAR_UPSTREAM_URL", "postgresql://h:x/d"}}).substr(0, 24),
            "PGSIDECAR_UPSTREAM_URL: ");
}

TEST(Load, MistakesOfDatabasesBesideOthers) {
  EXPECT_EQ(mistakes_of("upstream:\n  sslmode: bogus\n"
                        "databases:\n  a: {}\n  b: {upstream: {port: x}}\n  c: {upstream: 'host=h port=y'}\n"
                        "  d: {upstream: {url: postgresql://h/d, sslmode: no}}\nlog: {level: loud}\n"),
            "f:8: log.level: \"loud\" is none of: trace, debug, info, warn, error, off\n"
            "f:2: upstream.sslmode: invalid sslmode value \"bogus\"\n"
            "f:5: databases.b.upstream.port: invalid integer value \"x\" for \"port\"\n"
            "f:6: databases.c.upstream: connection string: invalid integer value \"y\" for \"port\"\n"
            "f:7: databases.d.upstream.sslmode: invalid sslmode value \"no\"");
}

TEST(Load, AnEmptyUrlIsNone) {
  for (const char* empty : {"", " ", "\n"}) {
    EXPECT_EQ(mistakes_of("databases: {a: {}}", {{"DATABASE_URL", empty}}).substr(0, 62),
              "upstream.url: no database to connect to: set DATABASE_URL (or ")
        << empty;
    EXPECT_EQ(mistakes_of("upstream: {url: '${X}'}", {{"X", empty}}).substr(0, 41), "f:1: upstream.url: no database to connect") << empty;
    const Environment both = environment({{"DATABASE_URL", "postgresql://u@good/d\n"}, {"PGSIDECAR_UPSTREAM_URL", empty}});
    EXPECT_EQ(resolve_upstream(load_text("", "x", both).upstream, both).destination(),
              "host=good port=5432 dbname=d user=u sslmode=verify-full");
    const Environment host = environment({{"DATABASE_URL", empty}, {"PGSIDECAR_UPSTREAM_HOST", "h"}});
    EXPECT_EQ(resolve_upstream(load_text("", "x", host).upstream, host).hosts.at(0).name, "h");
  }
}

TEST(Load, WithoutAUrlTheServerIsWhereLibpqFindsIt) {
  const std::string service = testing::TempDir() + "pg_service.conf";
  std::ofstream(service) << "[mine]\nhost=h\nuser=u\ndbname=d\n";
  using Variables = std::map<std::string, std::string>;
  const std::pair<const char*, Variables> rows[] = {
      {"", {{"PGHOST", "h"}, {"PGUSER", "u"}, {"PGDATABASE", "d"}}},
      {"", {{"PGHOST", "h"}, {"PGUSER", "u"}, {"PGDATABASE", "d"}, {"DATABASE_URL", " "}, {"PGSIDECAR_UPSTREAM_URL", ""}}},
      {"", {{"PGSERVICE", "mine"}, {"PGSERVICEFILE", service}}},
      {"upstream: {service: mine}", {{"PGSERVICEFILE", service}}},
      {"upstream: {dbname: d}", {{"PGHOST", "h"}, {"PGUSER", "u"}}},
      {"upstream: {hostaddr: 192.0.2.1, user: u, dbname: d}", {{"PGHOST", "h"}}},
  };
  for (const auto& [yaml, variables] : rows) {
    const Environment env = environment(variables);
    EXPECT_EQ(resolve_upstream(load_text(yaml, "x", env).upstream, env).destination(),
              "host=h port=5432 dbname=d user=u sslmode=verify-full")
        << yaml;
  }
  EXPECT_NE(mistakes_of("", {{"PGUSER", "u"}, {"PGDATABASE", "d"}}).find("no database to connect to"), std::string::npos);
  EXPECT_NE(mistakes_of("upstream: {dbname: d}", {}).find("no database to connect to"), std::string::npos);
  std::remove(service.c_str());
}

TEST(Load, AliasesOfAliases) {
  std::string yaml = "a0: &a0 {x: 1}\n";
  for (int i = 1; i < 15; ++i) {
    yaml += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " {";
    for (int j = 0; j < 6; ++j) yaml += "k" + std::to_string(j) + ": *a" + std::to_string(i - 1) + ", ";
    yaml += "}\n";
  }
  EXPECT_NE(mistake([&] { load_text(yaml, "x", kUrl); }).find("too deeply, or too much"), std::string::npos);
}

TEST(Load, WhatIsWrong) {
  const struct {
    const char *yaml, *says;
  } rows[] = {
      {"pool.max: 5\n", "x:1: pool.max: keys are nested: pool: {max: ...}"},
      {"[", "not valid YAML"},
      {"3", "mapping"},
      {"pool: 3", "mapping"},
      {"pool: {min: 20}", "more than"},
      {"pool: {max: 3}\n---\npool: {max: 4}\n", "x:3: a second document"},
      {"pool: {min: 2, max: 1}", "pool.min: 2 is more than pool.max (1)"},
      {"pool: {allowExitOnIdle: true, idleTimeoutMillis: 0}", "pool.allowExitOnIdle: waits until"},
      {"users: {a: {pool: {allowExitOnIdle: true}}}", "x:1: users.a.pool.allowExitOnIdle: counts for the whole process"},
      {"tls: {mode: require}", "tls.certificate"},
      {"listen: nowhere", "host:port"},
      {"listen: [nowhere, 'h:x']", "\"nowhere\" is not host:port, [v6]:port or unix:/directory; \"x\""},
      {"listen: ['127.0.0.1:7001', '127.0.0.1:7001']", "x:1: listen: \"127.0.0.1:7001\" is listened on already"},
      {"listen: ['*:7001', '[::1]:7001']", "\"[::1]:7001\" is listened on already"},
      {"listen: ['h:7001', 'unix:/tmp', 'unix:/tmp:7001']", "\"unix:/tmp:7001\" is listened on already"},
      {"upstream: {url: 'postgresql://h/d?colour=red&taste=sweet'}",
       "x:1: upstream.url: connection string: unknown parameter \"colour\"\n"},
      {"upstream: {url: 'postgresql://h/d?colour=red&taste=sweet'}", "x:1: upstream.url: connection string: unknown parameter \"taste\""},
      {"pool: {mni: 3}", "did you mean \"pool.min\"?"},
      {"pool: {idleTimeout: 3}", "did you mean \"pool.idleTimeoutMillis\"?"},
      {"maxClients: 3", "did you mean \"limits.maxClients\"?"},
      {"upstream: {connectionString: x}", "x:1: upstream.connectionString: unknown key"},
      {"log: {level: loud}", "none of"},
      {"upstream: {url: '${NO_SUCH}'}", "NO_SUCH is not set"},
      {"upstream: {url: 'postgresql://h:x/d'}", "port"},
      {"users: {u: {password: '${file:/no/such}'}}", "/no/such"},
      {"users: {u: {password: '${file:/no/such}'}}", "named by ${file:}: No such file or directory"},
      {"admin: {tokenFile: /no/such}", "admin.tokenFile: cannot read \"/no/such\": No such file or directory"},
      {"pool: {keepAlive: perhaps}", "true"},
      {"listen: '::1:5432'", "[address]:port"},
      {"admin: {listen: 'unix:/tmp'}", "host:port or off"},
      {"tls: {mode: require, certificate: /no/such, key: /no/such}", "cannot read \"/no/such\""},
      {"users: {u: {pool: {min: 20}}}", "x:1: users.u.pool.min"},
      {"users: {u: {password: md500112233445566778899aabbccddeeff}}", "md5 hash"},
      {"users: {u: {password: SCRAM-SHA-256$bad}}", "x:1: users.u.password: begins as a SCRAM verifier and is none"},
      {"users: {u: {password: 'SCRAM-SHA-256$4096:c2FsdA==$YQ==:YQ=='}}", "begins as a SCRAM verifier and is none"},
      {"upstream: {sslrootcert: /no/such}", "cannot read sslrootcert \"/no/such\""},
      {"auth: {method: cert}\ntls: {ca: /etc/hostname}", "tls.mode"},
      {"upstream: {passwordCommand: [no-such-program]}", "x:1: upstream.passwordCommand: cannot find the program \"no-such-program\""},
      {"upstream: {passwordCommand: {a: b}}", "a list of a program"},
      {"upstream: {passwordCommand: [/bin/echo, '${NO_SUCH}']}", "NO_SUCH is not set"},
      {"upstream: {url: 'postgresql://u@h/d', passwordCommand: [/bin/echo]}", "set users.\"u\".password"},
      {"upstream: {suspendAfterSecond: 3}", "did you mean \"suspendAfterSeconds\"?"},
      {"upstream: {suspendAfterSeconds: soon}", "whole number"},
      {"upstream: {dbname: 'postgresql://app:hunter2@h/d'}", "x:1: upstream.dbname: a dbname is a name, not a connection string"},
      {"databases: {d: no}", "x:1: databases.d: a mapping of keys is expected"},
      {"users: {a: pw}", "x:1: users.a: a mapping of keys is expected"},
      {"users: [a]", "x:1: users: a mapping of names is expected"},
      {"users: {'': {}}", "x:1: users: a name is expected"},
      {"databases: {'': {}}", "x:1: databases: a name is expected"},
      {"alerts: {connectionsPercent: 200}", "\"200\" is not a whole number from 0 to 100"},
      {"listen: ['127.0.0.1:7001']\nadmin: {listen: '*:7001'}", "x:2: admin.listen: \"127.0.0.1:7001\" is where clients connect (listen)"},
      {"pool: {idle_timeout: 3}", "did you mean \"pool.idleTimeoutMillis\"?"},
      {"pool: {max_uses: 3}", "did you mean \"pool.maxUses\"?"},
      {"pool: {timeout: 3}", "TimeoutMillis\"?"},
      {"pool: {poolMode: session}", "did you mean \"pool.mode\"?"},
      {"pool: {maxClients: 3}", "did you mean \"limits.maxClients\"?"},
      {"listen_addr: '*'", "did you mean \"listen\"?"},
      {"url: x", "did you mean \"upstream.url\"?"},
      {"upstream: {hostname: h}", "did you mean \"host\"?"},
      {"databases: {a: {url: x}}", "x:1: databases.a.url: unknown key (did you mean \"upstream.url\"?)"},
      {"databases: {a: {mode: session}}", "did you mean \"pool.mode\"?"},
      {"databases: {a: {max: 3}}", "did you mean \"pool.max\"?"},
      {"databases: {a: {upstrem: x}}", "did you mean \"upstream\"?"},
      {"users: {a: {max: 3}}", "did you mean \"pool.max\"?"},
      {"users: {a: {passwd: x}}", "did you mean \"password\"?"},
  };
  for (const auto& row : rows) {
    const std::string text = mistake([&] { load_text(row.yaml, "x", kUrl); });
    EXPECT_NE(text.find(row.says), std::string::npos) << row.yaml << " -> " << text;
  }
  for (const char* yaml : {"upstream: {connectionString: x}", "colour: red", "a: 1", "admin: {port: 1}"})  // nothing is near
    EXPECT_EQ(mistake([&] { load_text(yaml, "x", kUrl); }).find("did you mean"), std::string::npos) << yaml;
  EXPECT_NE(mistake([] { load_text("", "", environment({})); }).find("set DATABASE_URL"), std::string::npos);
  EXPECT_NE(mistake([] { load("/tmp", kUrl); }).find("cannot read the configuration file"), std::string::npos);
  EXPECT_EQ(mistake([] { load_text("- a\n- b\n", "x", kUrl); }), "x:1: a mapping of keys is expected");
  EXPECT_TRUE(mistake([] { load("/dev/null", kUrl); }).empty());
}

TEST(Load, Expands) {
  const auto env = environment({{"A", "x"}, {"EMPTY", ""}});
  EXPECT_EQ(expand("a${A}b$$c$", env), "axb$c$");
  EXPECT_EQ(expand("${B:-d}${EMPTY:-e}", env), "de");
  EXPECT_FALSE(mistake([&] { expand("${B}", env); }).empty());
  EXPECT_FALSE(mistake([&] { expand("${A", env); }).empty());
}

TEST(Load, SecretsAreNotPrinted) {
  const Config config =
      load_text("users: {u: {password: hunter2}}\nupstream: {url: 'postgresql://u:hunter3@h/d', password: hunter4}\n", "x", kUrl);
  const std::string text = to_redacted_yaml(config, kUrl);
  EXPECT_EQ(text.find("hunter"), std::string::npos) << text;
  EXPECT_NE(text.find("maxUses"), std::string::npos);
  EXPECT_NE(text.find("# host=h port=5432 dbname=d user=u sslmode=verify-full\n"), std::string::npos) << text;
  const Config defaulted = load_text("upstream: {url: '${NOPE:-postgresql://u:hunter2@h/d}'}\n", "x", kUrl);
  EXPECT_EQ(to_redacted_yaml(defaulted, kUrl).find("hunter2"), std::string::npos);
}

TEST(Load, WhatOptionsSetIsNotPrinted) {
  const Config config =
      load_text("upstream: {url: 'postgresql://u@h/d', options: '-c app.token=hunter2 --b=hunter\\ 3=4 -S 64'}\n", "x", kUrl);
  EXPECT_NE(to_redacted_yaml(config, kUrl).find("options: -c app.token=*** --b=*** -S 64\n"), std::string::npos);
}

TEST(Load, BooleansOfYaml) {
  for (const char* yes : {"true", "True", "TRUE", "on"})
    EXPECT_TRUE(load_text(std::string("watchConfig: ") + yes, "x", kUrl).watchConfig) << yes;
  for (const char* no : {"false", "False", "FALSE", "off"})
    EXPECT_FALSE(load_text(std::string("pool: {keepAlive: ") + no + "}", "x", kUrl).pool.keepAlive) << no;
}

TEST(Load, MinByDefaultIsNoMoreThanMax) {
  const Config config = load_text("pool: {max: 1}\ndatabases: {d: {pool: {max: 3}}, e: {}}\nusers: {u: {pool: {max: 1}}}\n", "x", kUrl);
  EXPECT_EQ(config.pool.min, 1u);
  EXPECT_EQ(config.databases.at("d").pool.min, 2u);
  EXPECT_EQ(config.databases.at("e").pool.min, 1u);
  EXPECT_EQ(overlay(config.databases.at("d").pool, config.users.at("u").pool).min, 1u);
}

TEST(Load, AnAliasOfWhatItIsInIsAMistake) {
  for (const char* text : {"pool: &a {x: *a}", "alerts: &a {webhooks: *a}", "databases: &a {x: *a}", "listen: &a [*a]"})
    EXPECT_FALSE(mistake([&] { load_text(text, "x", kUrl); }).empty()) << text;
}

TEST(Load, HttpUrls) {
  const HttpUrl plain = parse_http_url("http://host");
  EXPECT_EQ(plain.target, "/");
  EXPECT_EQ(plain.port, 80);
  EXPECT_FALSE(plain.tls);
  const HttpUrl full = parse_http_url("https://[::1]:9093/a/b?c=d#e");
  EXPECT_TRUE(full.tls);
  EXPECT_EQ(full.host, "::1");
  EXPECT_EQ(full.port, 9093);
  EXPECT_EQ(full.authority, "[::1]:9093");
  EXPECT_EQ(full.target, "/a/b?c=d");
  EXPECT_EQ(parse_http_url("https://host?x").target, "/?x");
  for (const char* wrong : {"", "host", "ftp://host", "http://", "http://:80/", "http://u:p@host/", "http://host:0/", "http://host:x/",
                            "http://host:70000/", "http://ho st/", "http://host/\r\nX: y", "http://[]/"})
    EXPECT_THROW(parse_http_url(wrong), std::invalid_argument) << wrong;
}

TEST(Load, SaysWhatAReloadChanges) {
  Config a = load_text("", "x", kUrl), b = a;
  b.pool.max = 3;
  b.listen[0].port = 1;
  const Changes changes = compare(a, b);
  EXPECT_EQ(changes.applied, std::vector<std::string>{"pool.max"});
  EXPECT_EQ(changes.needRestart, std::vector<std::string>{"listen"});
}

TEST(Load, SaysWhichSectionsAReloadChanges) {
  const auto changed = [](const char* before, const char* after) {
    return compare(load_text(before, "x", kUrl), load_text(after, "x", kUrl)).applied;
  };
  using Paths = std::vector<std::string>;
  EXPECT_EQ(changed("upstream: {sslmode: require, passwordCommand: [/bin/echo]}\nusers: {u: {password: p}}",
                    "upstream: {url: 'host=h', passwordCommand: [/bin/echo, x], passwordCacheSeconds: 1}\nusers: {u: {password: p}}"),
            (Paths{"upstream.passwordCacheSeconds", "upstream.passwordCommand", "upstream.sslmode", "upstream.url"}));
  EXPECT_EQ(changed("databases: {a: {}, b: {}, c: {pool: {max: 3}}}", "databases: {b: {upstream: {port: 1}}, c: {pool: {max: 4}}, d: {}}"),
            (Paths{"databases.a", "databases.b.upstream.port", "databases.c.pool.max", "databases.d"}));
  EXPECT_EQ(changed("pool: {max: 5}\ndatabases: {a: {}, b: {pool: {max: 3}}}", "pool: {max: 6}\ndatabases: {a: {}, b: {pool: {max: 4}}}"),
            (Paths{"pool.max", "databases.b.pool.max"}));
  EXPECT_EQ(changed("databases: {a: {}}", "upstream: {sslmode: require}\ndatabases: {a: {}}"), Paths{"upstream.sslmode"});
  EXPECT_EQ(changed("users: {u: {password: s}, w: {}}", "users: {u: {password: t, pool: {max: 3}}, v: {}}"),
            (Paths{"users.u.password", "users.u.pool.max", "users.v", "users.w"}));
}

TEST(Load, FilesOfAConfiguration) {
  const std::string file = testing::TempDir() + "files_of.yaml", secret = testing::TempDir() + "files_of.secret";
  std::ofstream(secret) << "s\n";
  std::ofstream(file) << "upstream: {url: 'postgresql://u:${file:" << secret << "}@h/d?sslrootcert=system'}\n"
                      << "databases: {other: {upstream: {url: 'postgresql://u@h/d?sslmode=verify-full&sslrootcert=" << secret << "'}}}\n"
                      << "tls: {certificate: /c, key: /k}\n";
  const Environment env = environment({{"PGSIDECAR_LOG_LEVEL", "${file:" + file + ".level}"}});
  std::ofstream(file + ".level") << "warn";
  EXPECT_EQ(files_of(load(file, env), file, env), (std::set<std::string>{file, secret, "/c", "/k", file + ".level"}));
}

TEST(Load, FilesThatAConnectionIsMadeWith) {
  const std::string home = testing::TempDir() + "files_of_home", service = home + "/service";
  std::filesystem::create_directories(home);
  std::ofstream(service) << "[mine]\nhost=h\npassfile=" << home << "/passfile\n";
  std::ofstream(home + "/.pgpass") << "*:*:*:*:p\n";
  const Environment env = environment({{"HOME", home}, {"PGSERVICEFILE", service}, {"DATABASE_URL", "postgresql://u@h/d"}});
  const auto files = [&](const char* yaml) { return files_of(load_text(yaml, "x", env), "", env); };
  EXPECT_EQ(files(""), std::set<std::string>{home + "/.pgpass"});
  EXPECT_EQ(files("upstream: {password: p}"), std::set<std::string>{});
  EXPECT_EQ(files("upstream: {service: mine}"), (std::set<std::string>{service, home + "/passfile"}));
  EXPECT_EQ(files(("upstream: {password: p, sslcrldir: " + home + "}").c_str()), std::set<std::string>{home});
  std::filesystem::remove_all(home);
}

TEST(Load, EnvironmentNames) {
  EXPECT_EQ(environment_name("pool.idleTimeoutMillis"), "PGSIDECAR_POOL_IDLE_TIMEOUT_MILLIS");
  EXPECT_EQ(environment_name("admin.listen"), "PGSIDECAR_ADMIN_LISTEN");
}

TEST(Load, WarnsIfNobodyCanLogIn) {
  const auto warned = [](std::string_view yaml, const char* url) {
    const Environment env = environment({{"DATABASE_URL", url}});
    for (const std::string& warning : upstream_warnings(load_text(yaml, "x", env), env))
      if (warning.starts_with("nobody can log in")) return true;
    return false;
  };
  EXPECT_TRUE(warned("", "postgresql://u@h/d"));
  EXPECT_TRUE(warned("users: {u: {pool: {max: 3}}}", "postgresql://u@h/d"));
  EXPECT_FALSE(warned("", "postgresql://u:p@h/d"));
  EXPECT_FALSE(warned("users: {w: {password: p}}", "postgresql://u@h/d"));
  EXPECT_FALSE(warned("auth: {method: trust}", "postgresql://u@h/d"));
  EXPECT_FALSE(warned("auth: {method: password}\nusers: {'*': {}}", "postgresql://u@h/d"));
}

/// All lines.
std::string warnings_of(const std::string& yaml) {
  std::string all;
  for (const std::string& warning : upstream_warnings(load_text(yaml, "x", kUrl), kUrl)) all += warning + "\n";
  return all;
}

TEST(Load, WarnsOfLoginsThatTheNetworkCanUseOrRead) {
  const std::string trust = "auth: {method: trust}\n", password = "auth: {method: password}\n";
  for (const char* open : {"'*:1'", "0.0.0.0:1", "'[::]:1'", "127.example.com:1", "['127.0.0.1:1', '10.0.0.1:1']"}) {
    EXPECT_TRUE(warnings_of(trust + "listen: " + open).starts_with("auth.method trust lets in whoever can connect to ")) << open;
    EXPECT_TRUE(warnings_of(password + "listen: " + open).ends_with(" in clear text: set tls.mode to require\n")) << open;
    EXPECT_EQ(warnings_of(std::string("listen: ") + open), "");
  }
  for (const char* local : {"127.0.0.1:1", "'[::1]:1'", "localhost:1", "unix:/tmp"}) {
    EXPECT_EQ(warnings_of(trust + "listen: " + local), "") << local;
    EXPECT_EQ(warnings_of(password + "listen: " + local), "") << local;
  }
  const std::string key = testing::TempDir() + "network.key";
  std::ofstream(key) << "";
  ::chmod(key.c_str(), 0600);
  const auto tls = [&](const std::string& mode) {
    return "listen: '*:1'\ntls: {mode: " + mode + ", certificate: /dev/null, ca: /dev/null, key: " + key + "}";
  };
  EXPECT_NE(warnings_of(trust + tls("require")), "");
  EXPECT_EQ(warnings_of(trust + tls("verify-full")), "");
  EXPECT_NE(warnings_of(password + tls("allow")), "");
  EXPECT_EQ(warnings_of(password + tls("require")), "");
  std::remove(key.c_str());
}

TEST(Load, WarnsOfUsersWithoutAPassword) {
  EXPECT_EQ(warnings_of("users: {app: {}, w: {}, v: {password: p}}"), "users.w: without a password nobody can log in as w\n");
  EXPECT_EQ(warnings_of("auth: {method: trust}\nusers: {w: {}}"), "");
  EXPECT_EQ(warnings_of("auth: {method: password}\nusers: {'*': {}, w: {}}"), "users.w: without a password nobody can log in as w\n");
  EXPECT_EQ(warnings_of("users: {w: {}}\ndatabases: {d: {upstream: {user: w, password: p}}}"), "");
}

TEST(Load, WarnsOfAKeyThatEverybodyCanRead) {
  const std::string key = testing::TempDir() + "open.key", tls = "tls: {certificate: /dev/null, key: " + key;
  std::ofstream(key) << "";
  for (const auto& [mode, open] : {std::pair{0644, true}, {0640, false}, {0600, false}}) {
    ::chmod(key.c_str(), mode);
    EXPECT_EQ(warnings_of(tls + ", mode: allow}").starts_with("tls.key: "), open) << mode;
    EXPECT_EQ(warnings_of(tls + "}"), "");
  }
  std::remove(key.c_str());
}

TEST(Load, WarnsOfATokenThatNobodyCanSend) {
  const std::string file = testing::TempDir() + "token";
  for (const auto& [text, says] : {std::pair{"", "is empty"}, {" \n", "is empty"}, {"a\nb\n", "more than one line"}, {"\na\n", ""}}) {
    std::ofstream(file) << text;
    const std::string warned = warnings_of("admin: {tokenFile: " + file + "}");
    EXPECT_TRUE(*says ? warned.find(says) != warned.npos : warned.empty()) << text << warned;
  }
  std::remove(file.c_str());
}

TEST(Load, WarnsOfAVerifierWhereTheServerWantsAPassword) {
  const auto warned = [](const std::string& yaml) {
    for (const std::string& warning : upstream_warnings(load_text(yaml, "x", kUrl), kUrl))
      if (warning.starts_with("users.w.password: a SCRAM verifier")) return true;
    return false;
  };
  const std::string key(43, 'a'), verifier = "{password: 'SCRAM-SHA-256$4096:c2FsdA==$" + key + "=:" + key + "='}";
  EXPECT_TRUE(warned("users: {w: " + verifier + "}"));
  EXPECT_FALSE(warned("users: {w: {password: plain}}"));
  EXPECT_FALSE(warned("users: {app: " + verifier + "}"));  // the URL has the password
  EXPECT_FALSE(warned("users: {w: " + verifier + "}\nupstream: {passwordCommand: [/bin/echo]}"));
}

}  // namespace
}  // namespace pgsidecar::conf
