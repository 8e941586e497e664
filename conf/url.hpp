// libpq connection strings: URIs (`postgresql://...`) and keyword strings (`host=... port=...`).
// PostgreSQL documentation, sections 34.1.1 "Connection Strings" and 34.1.2 "Parameter Key Words"; where node-postgres is
// more lenient than libpq (a `@` in a password), the lenient reading is taken when libpq's fails.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pgsidecar::conf {

enum class SslMode { Disable, Allow, Prefer, Require, VerifyCa, VerifyFull };
enum class SslNegotiation { Postgres, Direct };
enum class ChannelBinding { Disable, Prefer, Require };
enum class TargetSessionAttrs { Any, ReadWrite, ReadOnly, Primary, Standby, PreferStandby };

struct Host {
  std::string name;     ///< host name, address, or the directory of a unix socket (begins with / or @)
  std::string address;  ///< hostaddr: where to connect to; the name stays for SNI and verification
  std::uint16_t port = 5432;
  std::string password;  ///< the passfile's for this host; empty: ConnectParams::password counts

  bool is_unix() const { return address.empty() && !name.empty() && (name[0] == '/' || name[0] == '@'); }
  friend bool operator==(const Host&, const Host&) = default;
};

bool is_loopback(std::string_view host);

/// A connection string, read in full: what a connect needs. Sizes in bytes, times as named.
struct ConnectParams {
  std::vector<Host> hosts;             ///< never empty
  std::string user, password, dbname;  ///< password: as given; empty: each host's own
  SslMode sslmode = SslMode::VerifyFull;
  SslNegotiation sslnegotiation = SslNegotiation::Postgres;
  std::string sslrootcert;  ///< file, or empty or "system": the system's CAs
  std::string sslcert, sslkey, sslpassword;
  bool sslcertRequired = false;   ///< the server has to ask for sslcert
  std::string sslcrl, sslcrldir;  ///< a file; a directory as `openssl rehash` prepares one
  bool sslsni = true;
  std::string sslMinProtocolVersion = "TLSv1.2", sslMaxProtocolVersion;
  ChannelBinding channelBinding = ChannelBinding::Prefer;
  std::vector<std::string> requireAuth;    ///< empty: any method that the server asks for
  std::uint32_t connectTimeoutMillis = 0;  ///< 0: the pool's connectionTimeoutMillis
  std::optional<bool> keepalives;
  std::optional<std::uint32_t> keepalivesIdleSeconds, keepalivesIntervalSeconds, keepalivesCount;
  std::optional<std::uint32_t> tcpUserTimeoutMillis;
  TargetSessionAttrs targetSessionAttrs = TargetSessionAttrs::Any;
  bool loadBalanceHosts = false;
  /// Sent in the StartupMessage, in order: application_name, client_encoding, options.
  std::vector<std::pair<std::string, std::string>> startup;
  std::vector<std::string> warnings;  ///< keywords that are known and ignored; never a secret

  /// What clients of this user prove that they know: the password as given, or the first that a host has.
  const std::string& users_password() const;
  std::string destination() const;  ///< for whoever reads it: where it leads, as whom, and how protected
  friend bool operator==(const ConnectParams&, const ConnectParams&) = default;
};

/// Looks up an environment variable; nullopt if unset.
using Environment = std::function<std::optional<std::string>(std::string_view)>;

/// The process's environment.
Environment process_environment();

/// What is wrong with an upstream. Neither part is ever a secret.
struct Mistake {
  std::string from;  ///< what gave it: a keyword laid over the string, a PG* variable or a service file; empty: the string
  std::string text;
};

/// A file that a connection is made with.
struct UsedFile {
  std::string keyword;  ///< libpq's
  std::string from;     ///< as Mistake's
  std::string path;
};

struct Findings {
  std::vector<Mistake> mistakes;
  std::vector<UsedFile> files;

  void refuse() const;  ///< throws ConfigError (load.hpp) if there are mistakes
};

/// Reads a connection string. `overrides` are libpq keywords that win over the string; a service file and PG* variables fill
/// what both leave out, then the passfile, then the defaults (sslmode: prefer on loopback and unix sockets, else verify-full).
/// `default_dbname` counts if neither the string nor `overrides` name a database.
/// Throws ConfigError with all mistakes.
ConnectParams parse_connection_string(std::string_view text, const std::map<std::string, std::string>& overrides, const Environment& env,
                                      const std::string& default_dbname = {});

/// The same as far as it can be read. If there are mistakes in `findings` already something is missing: then what several values mean
/// together isn't judged.
ConnectParams read_connection_string(std::string_view text, const std::map<std::string, std::string>& overrides, const Environment& env,
                                     const std::string& default_dbname, Findings& findings);

/// A provider's own pooler in transaction mode (Neon's, Supabase's), on which no session can be kept: what to connect to instead.
/// Empty: it is none.
std::string instead_of_pooler(const Host& host);

std::string_view name_of(TargetSessionAttrs attrs);  ///< as written

/// libpq's keywords that are known, used or not.
std::vector<std::string_view> connection_keywords();

}  // namespace pgsidecar::conf
