// Tries a target's seeds: each as it is, cut at every place, and changed in fixed ways.
#include <random>

#include "fuzz.hpp"

int main() {
  std::minstd_rand random(1);
  const auto run = [](const std::string& s) {
    const Exact exact(s);
    LLVMFuzzerTestOneInput(exact.view().data(), exact.view().size());
  };
  run({});
  const std::vector<std::string> all = seeds();
  for (const std::string& seed : all) {
    for (std::size_t n = 0; n <= seed.size(); ++n) run(seed.substr(0, n));
    for (int i = 0; i < 3000 && !seed.empty(); ++i) {
      std::string changed = seed;
      for (auto n = 1 + random() % 4; n > 0 && !changed.empty(); --n) {
        const std::size_t at = random() % changed.size();
        switch (random() % 4) {
          case 0: changed[at] = static_cast<char>(random()); break;
          case 1: changed.erase(at, 1 + random() % 8); break;
          case 2: changed.insert(at, changed.substr(random() % changed.size(), random() % 16)); break;
          default: changed += all[random() % all.size()]; break;
        }
      }
      run(changed);
    }
  }
}
