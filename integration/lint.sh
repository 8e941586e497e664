#!/usr/bin/env bash
# Installs what is missing and checks the sources with clang-format (as test.sh does) and clang-tidy.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/integration/lib.sh"
install_packages test lint
cd "$root"

step "clang-format"
git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 --dry-run -Werror

step "clang-tidy"
cmake --preset clang -DCMAKE_EXPORT_COMPILE_COMMANDS=ON >/dev/null
git ls-files 'protocol/*.cpp' 'conf/*.cpp' 'pool/*.cpp' 'proxy/*.cpp' 'admin/*.cpp' |
  xargs -P "$(nproc)" -n 4 clang-tidy-14 -p build/clang --quiet
