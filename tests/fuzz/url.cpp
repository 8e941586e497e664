// Connection strings: whatever is written, a reading or a ConfigError.
#include "conf/url.hpp"

#include "conf/load.hpp"
#include "fuzz.hpp"

using namespace pgsidecar::conf;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Exact exact(data, size);
  try {
    const ConnectParams params = parse_connection_string(exact.text(), {}, [](std::string_view) { return std::nullopt; });
    require(!params.hosts.empty(), "there is a host");
    for (const Host& host : params.hosts) require(host.port != 0, "a port is one");
  } catch (const ConfigError& e) {
    require(!e.mistakes().empty() && *e.what() != '\0', "a mistake is named");
  }
  return 0;
}

std::vector<std::string> seeds() {
  return {"postgresql://u:p%40w@h1:1,[::1]:2/db?sslmode=require&options=-c%20a%3Db&application_name=x",
          "postgres://u:p@ss@host/db?host=/tmp&port=5433&target_session_attrs=read-write",
          "host=a,b port=1,2 user='it\\'s' password=\"x\" dbname = d sslmode=disable",
          "postgresql:///db?host=/var/run&connect_timeout=5&keepalives=0&channel_binding=require&require_auth=scram-sha-256,md5",
          "host=@abstract hostaddr=::1 sslrootcert=system sslnegotiation=direct",
          "postgresql://%",
          "postgresql://h:99999/",
          "host=a port=x"};
}
