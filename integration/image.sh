#!/bin/bash
# The image without a Docker engine: builds the binary, makes build/image/pgsidecar.oci.tar, and as root runs it before a private PostgreSQL: its
# user, a read-only root, no capabilities. Prints its digest and size and what it costs at rest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install_packages
build release pgsidecar
step "making the image twice"
cd "$root/integration"
COMMIT=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || true) /usr/bin/python3 image.py "$root/build/release/pgsidecar" "$root/build/image"
