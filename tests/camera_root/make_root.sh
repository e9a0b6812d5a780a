#!/usr/bin/env bash
# Makes a Debian 13 root at $1: libcamera from Debian and picamera2 from the package index, as a libcamera board has them. Needs root's
# rights; takes a few minutes, and about 700 MB. A finished one stays.
set -euo pipefail

root=$1
here=$(dirname "$(readlink -f "$0")")
[ ! -e "$root/made" ] || exit 0

rm -rf "$root" "$root.part"
mkdir -p "$root.part"
inside() { chroot "$root.part" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive "$@"; }

packages=(python3-libcamera libcamera-ipa python3-numpy python3-prctl python3-pip python3-dev gcc libc6-dev ca-certificates)
debootstrap --variant=minbase --include="$(IFS=, && echo "${packages[*]}")" trixie "$root.part" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"

# This machine's way to the package index: its name servers and the certificates that it trusts.
cp -L /etc/resolv.conf "$root.part/etc/resolv.conf"
cp -L "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root.part/etc/ssl/certs/ca-certificates.crt"
inside pip install --quiet --break-system-packages --no-cache-dir --root-user-action=ignore 'picamera2>=0.3.30' 'av>=15'

cp "$here/udmabuf.c" "$root.part/opt/"
inside gcc -shared -fPIC -O2 -Wall -Werror -o /opt/udmabuf.so /opt/udmabuf.c

touch "$root.part/made"
mv "$root.part" "$root"
