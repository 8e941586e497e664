#!/bin/bash
# PostgreSQL's own test suites (regress in the parallel schedule, isolation, libpq_pipeline) directly and through pgsidecar, compared
# with integration/regress-expected. Fetches and builds them once, in build/. About ten minutes. integration/regress.sh [--only SUITE,...]
set -euo pipefail
. "$(dirname "$0")/lib.sh"

install_packages test regress
build release

# The source package that belongs to the installed server, or the nearest that the archive still has, from the sources that apt uses
# anyway; apt's own lists stay as they are.
fetch_source() {
  local lists=$root/build/apt-sources
  mkdir -p "$lists/lists/partial"
  cat /etc/apt/sources.list.d/*.sources 2>/dev/null | sed 's/^Types:.*/Types: deb-src/' >"$lists/all.sources"
  { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true; } | sed -n 's/^deb /deb-src /p' >"$lists/all.list"
  local list options version
  for list in all.sources all.list; do
    [ -s "$lists/$list" ] || continue
    options=(-o "Dir::Etc::sourcelist=$lists/$list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$lists/lists")
    apt-get -qq "${options[@]}" update || continue
    for version in $(apt-cache "${options[@]}" showsrc postgresql-15 | sed -n 's/^Version: //p' | sort -rV); do
      (cd "$root/build" && apt-get -qq "${options[@]}" source --download-only "postgresql-15=$version") >>"$lists/log" 2>&1 && return 0
    done
  done
  die "no source package of postgresql-15 could be fetched, see $lists/log"
}

source_tree=$root/build/postgres
if [ ! -e "$source_tree/ready" ]; then
  step "fetching PostgreSQL's source package"
  fetch_source
  step "building its test programs"
  rm -rf "$source_tree" && mkdir -p "$source_tree"
  tar xjf "$(ls "$root"/build/postgresql-15_*.orig.tar.bz2 | sort -V | tail -n 1)" -C "$source_tree" --strip-components 1
  (
    cd "$source_tree"
    ./configure --with-openssl --without-readline --without-zlib CC="ccache gcc" CFLAGS=-O1
    make -s -j"$(nproc)" -C src/backend generated-headers
    for folder in src/interfaces/libpq src/bin/psql src/test/regress src/test/isolation src/test/modules/libpq_pipeline; do
      make -s -j"$(nproc)" -C $folder all
    done
  ) >"$root/build/postgres.log" 2>&1 || die "building failed, see build/postgres.log"
  touch "$source_tree/ready"
fi

step "running the suites"
/usr/bin/python3 "$root/integration/regress.py" "$source_tree" "$root/build/regress" "$@"
