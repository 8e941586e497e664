// Starts this program's binary anew, with the same arguments and the sockets that listen, for an online restart. Which file that is, is
// settled at start: one that was replaced since is the new binary.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "conf/listen.hpp"

namespace pgsidecar::proxy {

/// How this process was started.
struct Program {
  std::string path;
  std::vector<std::string> arguments;

  /// The path is argv[0], by PATH if need be, as long as it leads to the file that runs; else that file's own.
  static Program of(int argc, char** argv);
};

struct Launched {
  pid_t pid = 0;
  int link = -1;      ///< the caller's end; at its end of file the process is gone, or about to be
  std::string error;  ///< why nothing was started; then the rest is empty
};

/// The process is no child of this one: whoever looks after orphans (systemd) looks after it, and it outlives this one as a process like
/// any other. It has the standard streams, `sockets`, the link, and no other descriptor.
Launched launch(const Program& program, const std::vector<conf::Listening>& sockets);

}  // namespace pgsidecar::proxy
