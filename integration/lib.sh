# Shared by demo.sh and test.sh: a line of progress, packages, build. To be sourced.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
started=$SECONDS

step() { printf '[%3d s] %s\n' $((SECONDS - started)) "$*"; }
die() { echo "error: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    die "not root and no sudo: install these yourself: ${missing[*]-}"; fi
}

# packages_of [SECTION...]: the packages before the first section and those of the sections named.
packages_of() {
  awk -v wanted=" $* " '/^\[/ {skip = index(wanted, " " substr($1, 2, length($1) - 2) " ") == 0; next}
                        /^[^#]/ && NF && !skip {print $1}' "$root/integration/packages"
}

# install_packages [SECTION...]: installs what is missing, quietly; touches nothing else.
install_packages() {
  local package
  missing=()
  for package in $(packages_of "$@"); do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  step "installing ${#missing[@]} Debian packages: ${missing[*]}"
  local log=$root/build/apt.log
  mkdir -p "$root/build"
  # Private servers are all that is wanted: no cluster is made and no service started by the packages.
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    as_root mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' | as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
  fi
  local policy=/usr/sbin/policy-rc.d own_policy=no failed=no
  if [ ! -e $policy ]; then
    own_policy=yes
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
  fi
  { as_root apt-get -qq update &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
      -o Dpkg::Options::=--force-confold install "${missing[@]}"; } >"$log" 2>&1 || failed=yes
  [ $own_policy = no ] || as_root rm -f $policy
  [ $failed = no ] || { tail -n 20 "$log" >&2; die "apt-get failed, see $log"; }
}

# node-postgres from Debian's own packages, unpacked beside the build: apt refuses to install them next to a Node.js that
# isn't Debian's, and only these three, pure JavaScript, are needed.
fetch_node_postgres() {
  local to=$root/build/node
  [ -e "$to/usr/share/nodejs/pg/package.json" ] && return 0
  step "fetching node-postgres"
  mkdir -p "$root/build"
  local download
  download=$(mktemp -d)
  (
    cd "$download"
    chmod 755 .
    apt-get -qq download node-pg node-split2 node-xtend >apt.log 2>&1 || {
      as_root apt-get -qq update >>apt.log 2>&1
      apt-get -qq download node-pg node-split2 node-xtend >>apt.log 2>&1
    } || { cat apt.log >&2; exit 1; }
    for package in *.deb; do dpkg -x "$package" "$to"; done
  ) || die "could not fetch node-postgres"
  rm -rf "$download"
}

# build PRESET [TARGET]: configures and builds, output in build/PRESET.log.
build() {
  local preset=$1 target=${2:-all} log=$root/build/$1.log
  mkdir -p "$root/build"
  step "building the preset $preset (log: build/$preset.log)"
  (cd "$root" && cmake --preset "$preset" && cmake --build --preset "$preset" --target "$target") >"$log" 2>&1 ||
    { tail -n 40 "$log" >&2; die "the build of $preset failed, see $log"; }
}
