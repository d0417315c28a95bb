#!/usr/bin/env bash
# Runs the tests of this folder: in the cluster that KUBECONFIG names, or in one
# cluster after the other that kind makes here from clusters/ and takes away again.
set -euo pipefail
cd "$(dirname "$0")"

: "${VERSION:=devel}"
export SIGNALBOX_IMAGE="${SIGNALBOX_IMAGE:-signalbox:$VERSION}"
export SIGNALBOX_IPTABLES_IMAGE="${SIGNALBOX_IPTABLES_IMAGE:-signalbox-iptables:$VERSION}"

tests() { go test -tags kind -count=1 -timeout 60m -v .; }

if [ -n "${KUBECONFIG:-}" ]; then
  # LOAD_IMAGES is a command that brings the images it is given to the nodes.
  if [ -n "${LOAD_IMAGES:-}" ]; then $LOAD_IMAGES "$SIGNALBOX_IMAGE" "$SIGNALBOX_IPTABLES_IMAGE"; fi
  tests
  exit
fi

for program in docker kind; do
  command -v "$program" > /dev/null || { echo "e2e-kind needs $program, or a cluster: see doc.go" >&2; exit 1; }
done
make -C ../.. image VERSION="$VERSION"
KUBECONFIG="$(mktemp)"
export KUBECONFIG
cluster=
trap '[ -z "$cluster" ] || kind delete cluster --name "$cluster"; rm -f "$KUBECONFIG"' EXIT
for config in clusters/*.yaml; do
  cluster="signalbox-$(basename "$config" .yaml)"
  kind create cluster --name "$cluster" --config "$config" ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"}
  kind load docker-image --name "$cluster" "$SIGNALBOX_IMAGE" "$SIGNALBOX_IPTABLES_IMAGE"
  tests
  kind delete cluster --name "$cluster"
  cluster=
done
