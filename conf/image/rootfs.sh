#!/bin/sh
# What the image holds: the binary, the libraries that it loads, the CA certificates of Debian's package, and what names a user.
#   rootfs.sh BINARY DIRECTORY
# The Dockerfile and integration/image.py both make the image of it. The same input makes the same files, times included.
set -eu
binary=$1 root=$2
umask 022

mkdir -p "$root/etc/ssl/certs" "$root/usr/lib/ssl"
install -D -m 755 "$binary" "$root/usr/local/bin/pgsidecar"
# Its own functions keep their names, for /api/monitoring/profile/stacks: 180 KB.
strip -w -K '_ZN9pgsidecar*' -K '_ZNK9pgsidecar*' -K main "$root/usr/local/bin/pgsidecar"
# Under the dynamic linker's own paths. How glibc looks names up (files, dns) is within libc itself.
for library in $(ldd "$binary" | grep -o '/[^ ]*'); do
  install -D -m 755 "$(readlink -f "$library")" "$root$library"
done
# Not /etc/ssl/certs/ca-certificates.crt, to which a machine's administrator may have added.
find /usr/share/ca-certificates/mozilla -name '*.crt' | LC_ALL=C sort | xargs cat >"$root/etc/ssl/certs/ca-certificates.crt"
ln -sf /etc/ssl/certs/ca-certificates.crt "$root/usr/lib/ssl/cert.pem"
ln -sfn /etc/ssl/certs "$root/usr/lib/ssl/certs"
echo 'pgsidecar:x:65532:65532::/:/nonexistent' >"$root/etc/passwd"
echo 'pgsidecar:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
find "$root" -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
