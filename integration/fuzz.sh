#!/bin/bash
# Searches for inputs that break a parser or an invariant: builds the fuzz targets (clang, libFuzzer, ASan, UBSan) and runs each.
#   integration/fuzz.sh [SECONDS [TARGET...]]     60 seconds each of all targets by default
# What was found before is in build/fuzz/corpus, an input that fails in build/fuzz/crash-TARGET-*.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} != 0 ] || mapfile -t targets < <(sed -n 's/^pgsidecar_fuzz(\([a-z_]*\) .*/\1/p' "$root/tests/fuzz/CMakeLists.txt")

install_packages lint
mkdir -p "$root/build"
log=$root/build/fuzz.log
step "building ${#targets[@]} targets (log: build/fuzz.log)"
(cd "$root" && cmake --preset fuzz && cmake --build --preset fuzz --target "${targets[@]/#/fuzz_}") >"$log" 2>&1 ||
  { tail -n 40 "$log" >&2; die "the build failed"; }

failed=()
for target in "${targets[@]}"; do
  corpus=$root/build/fuzz/corpus/$target
  mkdir -p "$corpus"
  output=$root/build/fuzz/$target.log
  step "$target: $seconds s"
  if PGSIDECAR_SEEDS=$corpus "$root/build/fuzz/tests/fuzz/fuzz_$target" -max_total_time="$seconds" -timeout=5 -print_final_stats=1 \
    -artifact_prefix="$root/build/fuzz/crash-$target-" "$corpus" >"$output" 2>&1; then
    grep -E '^#.*DONE' "$output" || true
  else
    failed+=("$target")
    grep -E 'violated|ERROR|runtime error|SUMMARY|Test unit written' "$output" >&2 || tail -n 20 "$output" >&2
  fi
done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}"
step "nothing found"
