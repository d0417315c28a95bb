# Two images of one binary:
#
#   signalbox           nothing but the binary, for nftables and userspace
#   signalbox-iptables  with the iptables tools, both variants, and modprobe, for
#                       iptables and ipvs, and for nodes where another proxy's
#                       iptables rules are to be removed
#
# Both run as root: the capabilities that a Pod is given are root's alone.
ARG GO_IMAGE=golang:1.26-bookworm
ARG DEBIAN_IMAGE=debian:bookworm-slim

FROM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=devel
ARG TARGETARCH
RUN CGO_ENABLED=0 GOARCH=${TARGETARCH} go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.version=${VERSION}" -o /out/usr/local/bin/signalbox ./cmd/signalbox \
# The commands of kube-proxy's DaemonSets and static Pods find signalbox when the
# image is swapped; some, as kOps's, begin with /go-runner.
 && ln -s signalbox /out/usr/local/bin/kube-proxy \
 && ln -s usr/local/bin/signalbox /out/go-runner

FROM ${DEBIAN_IMAGE} AS signalbox-iptables
RUN apt-get update \
 && apt-get install -y --no-install-recommends iptables kmod \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/ /
ENTRYPOINT ["/usr/local/bin/signalbox"]

FROM scratch AS signalbox
COPY --from=build /out/ /
ENTRYPOINT ["/usr/local/bin/signalbox"]
