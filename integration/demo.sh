#!/bin/bash
# A PostgreSQL with TLS, pgsidecar in front of it, and proof that it works. Runs until Ctrl-C.
#   integration/demo.sh            a private PostgreSQL; with DATABASE_URL set, that server instead
#   integration/demo.sh --check    the same, then stops everything and exits 0 or 1
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case "${1-}" in
  '' | --check) ;;
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
  *) die "unknown argument: $1 (try --help)" ;;
esac

install_packages
build release pgsidecar
step "starting"
exec /usr/bin/python3 "$root/integration/demo.py" "$@"
