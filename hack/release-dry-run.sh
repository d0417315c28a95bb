#!/usr/bin/env bash
# Builds the release of the last commit into dist/, without a registry: binaries, archives,
# checksums, SBOMs, the chart, and both images of both platforms. Then it builds the
# binaries again, in another folder and with an empty build cache, and compares them.
set -euo pipefail
root=$(git rev-parse --show-toplevel)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tool() { go tool -modfile=hack/tools/release/go.mod "$@"; }
images() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

clone() {
	git clone -q "$root" "$1"
	cd "$1"
}

# Debian's package lists of both platforms, beside those of the machine.
package_lists() {
	mkdir -p "$work/apt/partial"
	cat > "$work/apt.conf" <<-END
		Dir::State::lists "$work/apt";
		Dir::Cache::pkgcache "";
		Dir::Cache::srcpkgcache "";
		APT::Architectures { "amd64"; "arm64"; };
		APT::Sandbox::User "root";
	END
	export APT_CONFIG=$work/apt.conf
	apt-get -qq update
}

# An archive of each image. The stage `tools` of the Dockerfile comes from a folder, so that
# no base image is needed.
build_images() {
	local context=$work/context arch name
	mkdir -p "$context/hack"
	cp -a hack/image "$context/hack/"
	package_lists
	for arch in amd64 arm64; do
		install -D "dist/signalbox_linux_${arch}"_*/signalbox "$context/linux/$arch/signalbox"
		hack/image/tools.sh "$arch" "$work/tools-$arch/tools"
		for name in signalbox signalbox-iptables; do
			images build -q --isolation chroot --platform "linux/$arch" --build-context "tools=$work/tools-$arch" \
				--target "$name" -t "$name:$arch" -f Dockerfile "$context" > /dev/null
			images push -q "$name:$arch" "docker-archive:dist/${name}_linux_$arch.tar"
		done
		one_file "dist/signalbox_linux_$arch.tar"
	done
}

# The image for nftables has one file, and two links to it.
one_file() {
	local got want='go-runner usr/local/bin/kube-proxy usr/local/bin/signalbox'
	tool crane export - "$work/files.tar" < "$1"
	got=$(tar -tf "$work/files.tar" | grep -v -x -e 'usr/\?' -e 'usr/local/\?' -e 'usr/local/bin/\?' | sort | xargs)
	if [ "$got" != "$want" ] || [ "$(tar -tvf "$work/files.tar" | grep -c '^-')" != 1 ]; then
		echo "$1 does not have $want, of which two are links to the third:" >&2
		tar -tvf "$work/files.tar" >&2
		exit 1
	fi
}

main() {
	clone "$work/first"
	make --no-print-directory release-files
	tool goreleaser release --snapshot --clean --skip=docker
	make --no-print-directory chart VERSION=v0.0.0 REGISTRY=registry.invalid
	tar -xOf dist/signalbox-0.0.0.tgz signalbox/values.yaml | grep -q '^  registry: "registry.invalid"'
	build_images
	rm -rf "$root/dist"
	cp -a dist "$root/dist"

	clone "$work/a-second-folder"
	# goreleaser itself comes from the usual cache.
	GOCACHE=$work/cache "$(tool -n goreleaser)" build --snapshot --clean
	for binary in dist/*/signalbox; do
		cmp "$binary" "$root/$binary"
	done
	echo "two builds are the same"
}

main
