#!/bin/bash
# Everything that is tested, on a fresh Debian 12: packages, build, unit tests, integration tests.
#   integration/test.sh               the release build
#   integration/test.sh --sanitize    besides: all of them with ASan+UBSan and with TSan too
# Further arguments go to pytest, e.g. -k cancel. The files of integration tests run three at a time; -n 0 runs one after the other.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

sanitize=no
arguments=()
for argument in "$@"; do
  case $argument in
    --sanitize) sanitize=yes ;;
    -h | --help) sed -n '2,5s/^# //p' "$0"; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done

failed=()

unit_tests() {
  step "unit tests ($1)"
  (cd "$root" && ctest --preset "$1" -j "$(nproc)" >"build/$1-ctest.log" 2>&1) || {
    failed+=("unit tests ($1)")
    grep -v ' Passed ' "$root/build/$1-ctest.log" | tail -n 80 >&2
  }
  grep -E 'tests passed|tests failed' "$root/build/$1-ctest.log" || true
}

# integration_tests PRESET
integration_tests() {
  local preset=$1
  step "integration tests ($preset)"
  (cd "$root/integration" &&
    PGSIDECAR=$root/build/$preset/pgsidecar NODE_PATH=$root/build/node/usr/share/nodejs \
      ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=0:exitcode=66 \
      /usr/bin/python3 -m pytest -q -n 3 --dist loadfile --durations=5 ${arguments[@]+"${arguments[@]}"}) || failed+=("integration tests ($preset)")
}

install_packages test
fetch_node_postgres
build release
unit_tests release
step "layout and layers"
(cd "$root" && git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 --dry-run -Werror) || failed+=("layout: git ls-files '*.cpp' '*.hpp' | xargs clang-format-14 -i")
/usr/bin/python3 "$root/tests/layering_test.py" || failed+=("layers")
integration_tests release

if [ $sanitize = yes ]; then
  for preset in dev tsan; do
    build $preset
    unit_tests $preset
    integration_tests $preset
  done
fi

if [ ${#failed[@]} != 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
step "all passed"
