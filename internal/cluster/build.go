// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// KubeVersion is the Kubernetes release that the API server and kube-proxy are
// built from; it must be the one that tools/go.mod requires.
const KubeVersion = "v1.37.2"

// Binaries are the paths of programs of Kubernetes: those of a control plane,
// and the proxy that signalbox replaces.
type Binaries struct {
	Etcd      string
	APIServer string
	KubeProxy string
}

// BinariesIn are the programs in a directory.
func BinariesIn(dir string) Binaries {
	return Binaries{
		Etcd:      filepath.Join(dir, "etcd"),
		APIServer: filepath.Join(dir, "kube-apiserver"),
		KubeProxy: filepath.Join(dir, "kube-proxy"),
	}
}

// Build builds etcd, kube-apiserver and kube-proxy from the module e2e/tools,
// unless e2e/.cache holds them already. log is told before something that
// takes minutes begins.
func Build(ctx context.Context, log func(format string, args ...any)) (Binaries, error) {
	root, cache, unlock, err := openCache(ctx)
	if err != nil {
		return Binaries{}, err
	}
	defer unlock()
	tools := filepath.Join(root, "e2e", "tools")
	key, err := toolsKey(tools)
	if err != nil {
		return Binaries{}, err
	}
	dir := filepath.Join(cache, key)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Binaries{}, err
	}
	bin := BinariesIn(dir)
	for path, pkg := range map[string]string{
		bin.Etcd:      "go.etcd.io/etcd/server/v3",
		bin.APIServer: "k8s.io/kubernetes/cmd/kube-apiserver",
		bin.KubeProxy: "k8s.io/kubernetes/cmd/kube-proxy",
	} {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		log("building %s, which takes minutes the first time", pkg)
		if err := goBuild(ctx, tools, path, pkg); err != nil {
			return Binaries{}, err
		}
	}
	return bin, nil
}

// BuildSignalbox builds the program under test and returns its path.
func BuildSignalbox(ctx context.Context) (string, error) {
	root, cache, unlock, err := openCache(ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	path := filepath.Join(cache, "signalbox")
	return path, goBuild(ctx, root, path, "./cmd/signalbox")
}

// openCache makes the directory that holds what is built, for one test binary
// at a time: `go test ./...` runs several.
func openCache(ctx context.Context) (root, cache string, unlock func(), err error) {
	if root, err = RootDir(ctx); err != nil {
		return "", "", nil, err
	}
	cache = filepath.Join(root, "e2e", ".cache")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", "", nil, err
	}
	unlock, err = lock(filepath.Join(cache, "lock"))
	return root, cache, unlock, err
}

// RootDir is the directory of the module signalbox, from wherever in the repository the
// program runs.
func RootDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "signalbox").Output()
	if err != nil {
		return "", fmt.Errorf("find the repository of signalbox: run this inside it: go list -m signalbox: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// toolsKey changes with everything that the tools are built from.
func toolsKey(tools string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH, KubeVersion)
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(tools, name))
		if err != nil {
			return "", err
		}
		h.Write(text)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// goBuild builds beside path and renames, so that an interrupted build leaves
// nothing that looks finished. Cgo is off: none of the programs needs it, and
// a machine without a C compiler can build them.
func goBuild(ctx context.Context, dir, path, pkg string) error {
	part := path + ".part"
	cmd := exec.CommandContext(ctx, "nice", "go", "build", "-trimpath", "-ldflags", "-s -w "+versionFlags(), "-o", part, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, out)
	}
	return os.Rename(part, path)
}

// versionFlags stamp the programs with their release, which they would
// otherwise not know: clients read the API server's at /version.
func versionFlags() string {
	var flags []string
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags, fmt.Sprintf("-X %s.gitVersion=%s", pkg, KubeVersion))
	}
	return strings.Join(flags, " ")
}
