# The commands of this repository. `make demo` and `make test` need root on a
# Debian or Ubuntu machine with Go, and nothing else: `make deps` brings the rest.
# `make help` shows a line that begins with ##@ as the title of a group.

SHELL := /bin/bash
GO ?= go
BIN := bin/signalbox
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
IMAGE ?= signalbox
# What the tests, the demo and the benchmarks run besides Go. The daemon itself
# needs none of it in nftables mode.
PACKAGES := nftables iptables iproute2

.DEFAULT_GOAL := build

##@ Every day

# The contract of one variant and family of each mode.
.PHONY: check
check: vet lint unit ## before each commit: linters, unit and a part of the contract, in less than three minutes
	$(GO) test -run 'TestNFTables/./IPv4|TestUserspace/./IPv4|TestIPTables/nft/./IPv4' ./proxier/conformance

# Each stage also runs after one that failed.
.PHONY: test
test: ## before each push: everything; the end lists each stage's duration and what failed in it
	@MAKE="$(MAKE)" hack/stages.sh build vet unit contract e2e vm

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^##@ / { printf "%s%s\n", sep, substr($$0, 5); sep = "\n" } \
		/^[a-z0-9-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Build

.PHONY: build
build: ## the binary, statically linked
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o $(BIN) ./cmd/signalbox

.PHONY: image
image: ## the container images: IMAGE:VERSION, and IMAGE-iptables:VERSION with the iptables tools
	docker build $(DOCKER_FLAGS) --build-arg VERSION=$(VERSION) --target signalbox -t $(IMAGE):$(VERSION) .
	docker build $(DOCKER_FLAGS) --build-arg VERSION=$(VERSION) --target signalbox-iptables -t $(IMAGE)-iptables:$(VERSION) .

.PHONY: lab
lab: ## bin/lab, which runs signalbox in a lab of network namespaces
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/lab ./cmd/lab

.PHONY: deps
deps: ## install what is missing from Debian's packages
	@hack/deps.sh $(PACKAGES)

.PHONY: architecture
architecture: ## draw the imports between the packages into docs/architecture.md
	$(GO) run ./hack/architecture

##@ Parts of check and test

.PHONY: vet
vet: ## go vet, in both modules
	$(GO) vet ./...
	cd e2e && $(GO) vet -tags kind,guest ./...

# Not a part of test: building golangci-lint would make a bare machine's first run minutes longer.
.PHONY: lint
lint: ## golangci-lint, in both modules, with the rules of .golangci.yml
	$(GO) tool -modfile=hack/tools/go.mod golangci-lint run ./...
	cd e2e && $(GO) tool -modfile=../hack/tools/go.mod golangci-lint run ./...

.PHONY: unit
unit: deps ## all packages but the contract suite
	$(GO) test -parallel 6 $$($(GO) list ./... | grep -v /proxier/conformance)

.PHONY: contract
contract: deps ## every mode against the contract suite, with real packets
	$(GO) test -timeout 30m ./proxier/conformance

# The first run builds Kubernetes, half an hour on two cores.
.PHONY: e2e
e2e: deps build ## the real binary and manifests against a real kube-apiserver and etcd
	cd e2e && $(GO) test -timeout 70m . ./cluster/... ./configuration ./lab ./manifests/...

.PHONY: vm
vm: PACKAGES += qemu-system-x86 ipset
vm: deps ## Debian's kernel in QEMU, for what needs it: IPVS, SCTP, and an older nf_tables
	cd e2e && $(GO) test -v -timeout 40m -skip '^TestLab$$' ./vm

##@ Longer tests, figures and a demonstration

.PHONY: e2e-kind
e2e-kind: ## the DaemonSet on nodes of kind, or of the cluster that KUBECONFIG names; see e2e/kind
	VERSION=$(VERSION) e2e/kind/run.sh

# How often each test runs in `make soak`.
SOAK ?= 20

.PHONY: soak
soak: PACKAGES += qemu-system-x86 ipset
soak: deps build ## for hours: the tests of traffic again and again, to find what fails once in many runs
	$(GO) test -count $(SOAK) -timeout 24h ./proxier/conformance
	cd e2e && $(GO) test -count $(SOAK) -timeout 24h -run '^(TestTakeover|TestKubeProxyLingers|TestKilledInAStorm|TestUpgrade|TestProxyRestart)$$' .
	cd e2e && $(GO) test -v -timeout 24h ./vm -soak

# The first run builds Kubernetes.
.PHONY: bench
bench: deps build lab ## signalbox beside kube-proxy: starts, changes, memory, connections; writes docs/performance.md
	bin/lab bench --kube-proxy --out docs/bench --document docs/performance.md

.PHONY: bench-parts
bench-parts: PACKAGES += haproxy
bench-parts: deps ## single parts: compile and apply at 1,000, 10,000 and 50,000 Services; the relay beside haproxy
	$(GO) test -run '^$$' -bench . -benchtime 5x -timeout 60m ./proxier/syncer ./nftables ./iptables
	$(GO) test -run '^$$' -bench BenchmarkRelay -benchtime 1x ./userspace

.PHONY: demo
demo: deps build lab ## a lab on this machine, every mode, real connections
	bin/lab demo --signalbox $(BIN)
