# The commands of this repository. They need root on a Debian or Ubuntu machine with
# Go, and nothing else: `make deps` brings the rest. `make test` needs Debian 12,
# whose kernel `make vm` runs.
# `make help` shows a line that begins with ##@ as the title of a group.

SHELL := /bin/bash
GO ?= go
BIN := bin/signalbox
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
IMAGE ?= signalbox
# The platform of `make image`, and the program that builds it: docker or buildah.
PLATFORM ?= linux/$(shell $(GO) env GOARCH)
DOCKER ?= docker
RELEASE_TOOL := $(GO) tool -modfile=$(CURDIR)/hack/tools/release/go.mod
# What the tests, the demo and the benchmarks run besides Go. The daemon itself
# needs none of it in nftables mode.
PACKAGES := nftables iptables iproute2 kmod

.DEFAULT_GOAL := build

##@ Every day

# The contract of one variant and family of each mode. lint has vet's analyzers.
.PHONY: check
check: lint release-check unit ## before each commit: linters, unit and a part of the contract, in less than three minutes
	$(GO) test -run 'TestNFTables/./IPv4|TestUserspace/./IPv4|TestIPTables/nft/./IPv4' ./proxier/conformance

# Each stage also runs after one that failed.
.PHONY: test
test: ## before each push: vet, unit, race, contract, e2e, vm; the end lists each stage's duration and what failed in it
	@MAKE="$(MAKE)" hack/stages.sh build vet unit race contract e2e vm

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^##@ / { printf "%s%s\n", sep, substr($$0, 5); sep = "\n" } \
		/^[a-z0-9-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Build

.PHONY: build
build: ## the binary, statically linked
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o $(BIN) ./cmd/signalbox

# The images' links to the binary. Git holds none: some checkouts turn links into files.
LINKS := hack/image/links
.PHONY: image-links
image-links:
	rm -rf $(LINKS) && mkdir -p $(LINKS)/usr/local/bin
	ln -s signalbox $(LINKS)/usr/local/bin/kube-proxy
	ln -s usr/local/bin/signalbox $(LINKS)/go-runner

.PHONY: image
image: image-links ## the container images: IMAGE:VERSION, and IMAGE-iptables:VERSION with the iptables tools
	CGO_ENABLED=0 GOOS=linux GOARCH=$(notdir $(PLATFORM)) $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" \
		-o bin/image/$(PLATFORM)/signalbox ./cmd/signalbox
	rm -rf bin/image/hack && mkdir bin/image/hack && cp -a hack/image bin/image/hack/
	for image in signalbox signalbox-iptables; do \
		DOCKER_BUILDKIT=1 $(DOCKER) build $(DOCKER_FLAGS) --platform $(PLATFORM) --build-arg VERSION=$(VERSION) --target $$image \
			-t $(IMAGE)$${image#signalbox}:$(VERSION) -f Dockerfile bin/image || exit; \
	done

# What a release has besides binaries and files of the repository: man pages, completions, the images' links.
.PHONY: release-files
release-files: image-links
	rm -rf bin/man bin/completions && mkdir -p bin/man bin/completions
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(GO) run -tags man -ldflags "-X main.version=$(VERSION:v%=%)" ./cmd/signalbox bin/man
	for shell in bash zsh fish; do $(GO) run ./cmd/signalbox completion $$shell > bin/completions/signalbox.$$shell || exit; done

.PHONY: chart
chart: ## the Helm chart of VERSION, vX.Y.Z, as dist/signalbox-X.Y.Z.tgz, with images of REGISTRY
	rm -rf bin/chart && mkdir -p bin/chart && cp -r manifests/helm/signalbox bin/chart/
	sed -i 's|^  registry: ""|  registry: "$(REGISTRY)"|' bin/chart/signalbox/values.yaml
	$(RELEASE_TOOL) helm package bin/chart/signalbox --destination dist --version $(VERSION:v%=%) --app-version $(VERSION)

CHART_README := $(RELEASE_TOOL) helm-docs --log-level=error --chart-search-root manifests/helm --sort-values-order file
.PHONY: chart-readme
chart-readme: ## the chart's README, from values.yaml
	$(CHART_README)

LICENCE_TEXTS := cmd/signalbox/licences.txt
.PHONY: licence-texts
licence-texts: ## the texts that `signalbox licences` prints, after a change of the modules
	hack/licences.sh > $(LICENCE_TEXTS)

# Packages whose tests need nothing of the kernel that qemu-user lacks, such as nf_tables' netlink.
.PHONY: arm64
arm64: PACKAGES := qemu-user-static
arm64: deps ## unit tests of policy and configuration as a program of linux/arm64, which QEMU emulates
	GOARCH=arm64 CGO_ENABLED=0 $(GO) test -exec qemu-aarch64-static ./proxier/service ./proxier/syncer ./internal/compact ./config

.PHONY: release-dry-run
release-dry-run: PACKAGES := buildah
release-dry-run: deps ## the release of the last commit into dist/, without a registry; two builds must be the same
	hack/release-dry-run.sh

.PHONY: lab
lab: ## bin/lab, which runs signalbox in a lab of network namespaces
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/lab ./cmd/lab

.PHONY: deps
deps: ## install what is missing from Debian's packages
	@hack/deps.sh $(PACKAGES)

.PHONY: architecture
architecture: ## draw the imports between the packages into docs/architecture.md
	$(GO) run ./hack/architecture

.PHONY: page
page: PACKAGES += chromium fonts-dejavu-core
page: deps ## render the status page in headless Chromium, and draw docs/pictures/services.png
	$(GO) test -count=1 -run TestPageInChromium ./explain -update

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

.PHONY: release-check
release-check: licences ## workflows, the configuration of a release, the chart and its README, and the licences
	$(RELEASE_TOOL) actionlint
	$(RELEASE_TOOL) goreleaser check --quiet
	$(RELEASE_TOOL) helm lint --quiet manifests/helm/signalbox --set apiServer=https://control-plane.invalid:6443 2> /dev/null
	$(CHART_README) --dry-run | diff - manifests/helm/signalbox/README.md || { echo "make chart-readme writes it anew" >&2; exit 1; }

# What `lab bench` draws its charts with is in no release: svgo has CC-BY-4.0, and freetype
# a choice of the FreeType License and the GPL.
LICENCES := --ignore signalbox --allowed_licenses=Apache-2.0,BSD-2-Clause,BSD-3-Clause,ISC,MIT,Unlicense \
	--logtostderr=false --log_file=/dev/null --stderrthreshold=ERROR
.PHONY: licences
licences: ## the licences of all modules that the programs and the tests link, and their texts in signalbox
	hack/licences.sh | diff -q - $(LICENCE_TEXTS) || { echo "make licence-texts writes them anew" >&2; exit 1; }
	$(RELEASE_TOOL) go-licenses check ./... --include_tests $(LICENCES) --ignore github.com/ajstarks/svgo --ignore github.com/golang/freetype
	cd e2e && $(RELEASE_TOOL) go-licenses check ./... --include_tests $(LICENCES)

# Not a part of check, which needs no network. A copy of the database has a URL such as file:///srv/vulndb.
VULNDB ?= https://vuln.go.dev
VULNCHECK := $(RELEASE_TOOL) govulncheck -db $(VULNDB)
.PHONY: vulncheck
vulncheck: ## known vulnerabilities of both modules and of Go, from a database on the network
	@$(VULNCHECK) -version | grep -q '^DB updated' || \
		{ echo "make vulncheck: $(VULNDB) does not answer, so nothing was checked" >&2; exit 1; }
	$(VULNCHECK) -test ./...
	cd e2e && $(VULNCHECK) -test -tags kind,guest ./...

.PHONY: unit
unit: deps ## all packages but the contract suite
	$(GO) test -parallel 6 $$($(GO) list ./... | grep -v /proxier/conformance)

# Where goroutines meet. The modes' other tests and the contract are single-threaded, or
# too slow under the race detector: `make soak` has them.
RACE := ./source/... ./daemon/nodelock ./conntrack ./config ./events ./explain ./health ./metrics ./node ./proxier/syncer/... ./nft/... ./userspace \
	./internal/budget ./internal/httpserve ./internal/localhost ./internal/tcprelay

.PHONY: race
race: PACKAGES += gcc libc6-dev
race: deps ## packages with many goroutines, and signalbox itself, under the race detector
	CGO_ENABLED=1 $(GO) test -race $(RACE)
	CGO_ENABLED=1 $(GO) test -race -run '^TestDo' ./internal/netlab
	CGO_ENABLED=1 $(GO) test -race -run '^(TestKilled|TestHeals|TestConfigurationChanges|TestConfigurationThatDoesNotWork|TestDescriptorsRunOut|TestUnreachableAPIServer|TestPortsChangeHands)$$' ./daemon

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
soak: PACKAGES += qemu-system-x86 ipset gcc libc6-dev
soak: deps build ## for hours: the tests of traffic again and again, to find what fails once in many runs
	$(GO) test -count $(SOAK) -timeout 24h ./proxier/conformance
	$(GO) test -count $$((10 * $(SOAK))) -timeout 24h -run '^TestKilled$$' ./daemon
	$(GO) test -count $(SOAK) -timeout 24h -run '^TestRandomSequences$$' ./proxier/syncer
	$(GO) test -count $$((10 * $(SOAK))) -timeout 24h -run '^TestRandomChanges$$' ./nftables
	$(GO) test -count $$((50 * $(SOAK))) -timeout 24h -run '^TestRandomChanges$$' ./iptables
	CGO_ENABLED=1 $(GO) test -race -timeout 24h ./...
	cd e2e && $(GO) test -count $(SOAK) -timeout 24h -run '^(TestTakeover|TestKubeProxyLingers|TestKilledInAStorm|TestUpgrade|TestProxyRestart)$$' .
	cd e2e && $(GO) test -v -timeout 24h ./vm -soak

# The first run builds Kubernetes. More modes need more time, for example
# BENCH='--mode nftables,iptables-legacy --kube-proxy-mode nftables,iptables-legacy --time 45m'.
.PHONY: bench
bench: deps build lab ## signalbox beside kube-proxy: starts, changes, memory, connections; writes docs/performance.md
	bin/lab bench --kube-proxy --family IPv4 --max-cpu 2% --out docs/bench --document docs/performance.md $(BENCH)

.PHONY: fleet
fleet: deps build lab ## what up to 200 daemons cost one API server; writes a section of docs/performance.md
	bin/lab fleet --kube-proxy --out docs/bench --document docs/performance.md

.PHONY: bench-parts
bench-parts: PACKAGES += haproxy
bench-parts: deps ## single parts: compile and apply at 1,000, 10,000 and 50,000 Services; the relay beside haproxy
	$(GO) test -run '^$$' -bench . -benchtime 5x -timeout 60m ./proxier/syncer ./nftables ./iptables
	$(GO) test -run '^$$' -bench BenchmarkRelay -benchtime 1x ./userspace

# The modes to compare, and how many random Services each gets.
COMPARE_MODES ?= nftables iptables-nft iptables-legacy userspace
COMPARE_CASES ?= 500
SEED ?= 1

# The first run builds Kubernetes.
.PHONY: compare
compare: deps build lab ## kube-proxy and signalbox side by side, on COMPARE_CASES random Services in each mode
	@for mode in $(COMPARE_MODES); do \
		bin/lab compare --signalbox $(BIN) --mode $$mode --random $(COMPARE_CASES) --seed $(SEED) --out bin || failed=1; \
	done; [ -z "$$failed" ]

.PHONY: demo
demo: deps build lab ## a lab on this machine, every mode, real connections
	bin/lab demo --signalbox $(BIN)
