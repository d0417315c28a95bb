#!/usr/bin/env bash
# tools.sh ARCHITECTURE DIRECTORY: unpacks Debian's iptables and kmod, with the libraries
# that they need, for an architecture of Debian. Nothing of that architecture runs: so
# images for arm64 need no emulation. It needs apt and the package lists of the architecture.
set -euo pipefail
architecture=$1 root=$2
debs=$(mktemp -d)
trap 'rm -rf "$debs"' EXIT
mkdir -p "$debs/partial" "$root/var/lib/dpkg/status.d"

# With an empty status file, apt takes the whole closure of dependencies.
apt-get -qq -y --no-install-recommends --download-only \
	-o APT::Architecture="$architecture" -o APT::Architectures::="$architecture" \
	-o Dir::State::status=/dev/null -o Dir::Cache::archives="$debs" -o APT::Sandbox::User=root \
	install "iptables:$architecture" "kmod:$architecture" > /dev/null

for deb in "$debs"/*.deb; do
	dpkg-deb --extract "$deb" "$root"
	# Scanners of images read the packages and versions there, as in distroless images.
	dpkg-deb --field "$deb" > "$root/var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)"
done

# Debian's alternatives: the nft variant is the default.
for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
	variant=${name/tables/tables-nft}
	[ -e "$root/usr/sbin/$variant" ] && ln -sf "$variant" "$root/usr/sbin/$name"
done
# Licences stay, other documents go, and so do conversions between character sets (20 MB).
rm -rf "$root"/usr/lib/*/gconv
find "$root/usr/share" -mindepth 1 -maxdepth 1 ! -name doc -exec rm -rf {} +
find "$root/usr/share/doc" -type f ! -name copyright -delete
