// Linked into the libFuzzer builds: PGSIDECAR_SEEDS names a directory that gets the seeds as its corpus.
#include <fstream>

#include "fuzz.hpp"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  if (const char* directory = std::getenv("PGSIDECAR_SEEDS")) {
    int n = 0;
    for (const std::string& seed : seeds())
      std::ofstream(directory + std::string("/seed-") + std::to_string(n++), std::ios::binary) << seed;
  }
  return 0;
}
