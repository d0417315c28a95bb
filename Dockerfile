# Two images of one binary, for linux/amd64 and linux/arm64:
#
#   signalbox           nothing but the binary, for nftables and userspace
#   signalbox-iptables  with the iptables tools, both variants, and modprobe, for
#                       iptables and ipvs, and for nodes where another proxy's
#                       iptables rules are to be removed
#
# Neither has a shell or a package manager. Both run as root: the capabilities that a Pod
# is given are root's alone.
#
# The context has the binary of each platform (linux/arm64/signalbox) and hack/image with the
# links of `make image-links`, as `make image` and goreleaser make it. No command of the target platform runs, so no build
# needs emulation.
ARG DEBIAN_IMAGE=debian:bookworm-slim

FROM --platform=$BUILDPLATFORM ${DEBIAN_IMAGE} AS tools
ARG TARGETARCH
COPY hack/image/tools.sh /tools.sh
RUN dpkg --add-architecture ${TARGETARCH} && apt-get update && /tools.sh ${TARGETARCH} /tools

FROM scratch AS signalbox
ARG TARGETPLATFORM
COPY ${TARGETPLATFORM}/signalbox /usr/local/bin/signalbox
# The commands of kube-proxy's DaemonSets and static Pods find signalbox when the
# image is swapped; some, as kOps's, begin with /go-runner.
COPY hack/image/links/ /
ARG VERSION=devel
LABEL org.opencontainers.image.title="signalbox" \
      org.opencontainers.image.description="Makes Kubernetes Services work on a node, in place of kube-proxy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["/usr/local/bin/signalbox"]

FROM signalbox AS signalbox-iptables
COPY --from=tools /tools/ /
