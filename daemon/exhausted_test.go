// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
)

// serviceAt changes the only endpoint of serviceTo's Service.
func serviceAt(t *testing.T, source string, pod *netlab.Host) {
	t.Helper()
	text := strings.Replace(reloadManifest, "POD", pod.Addr.V4.String(), 1)
	path := filepath.Join(source, "web.yaml")
	if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// answeredBy says whether a Pod answers at an address.
func answeredBy(t *testing.T, from *netlab.Host, at netip.AddrPort, pod *netlab.Host) func() bool {
	return func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		a, err := from.AskAndReset(ctx, "tcp", at)
		return err == nil && a.Server == pod.Name
	}
}

// TestDescriptorsRunOut: a process that can open no file for a while goes on serving. What
// changes meanwhile takes effect as soon as it can.
func TestDescriptorsRunOut(t *testing.T) {
	for _, variant := range []string{"nftables", "iptables", "iptables-legacy", "userspace"} {
		t.Run(variant, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t)
			client, before, after := lab.Host("pod-x"), lab.Host("pod-a"), lab.Host("pod-b")
			source := serviceTo(t, before)
			mode := modeOf(variant)
			chooseVariant(t, lab.Host("node1"), variant)
			process, log := startProcess(t, lab.Host("node1"), build(t), "run", "--source", source, "--mode", mode,
				"--hostname-override=node1", "--cluster-cidr=10.244.0.0/16", "--conntrack-max-per-core=0", "--oom-score-adj=0")
			web := netip.MustParseAddrPort("10.96.0.10:80")
			eventually(t, "both families are served", func() bool { return log.count("level=INFO msg=synced") == 2 })
			if !answers(t, client, web, hangTimeout) {
				t.Fatal("the Service does not answer")
			}

			limit := func(cur uint64) (old unix.Rlimit) {
				t.Helper()
				err := unix.Prlimit(process.Pid, unix.RLIMIT_NOFILE, nil, &old)
				if err == nil {
					err = unix.Prlimit(process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: old.Max}, nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				return old
			}
			usual := limit(0)
			serviceAt(t, source, after)
			eventually(t, "it notices that it can open no file", func() bool { return log.count("too many open files") > 0 })
			if mode != "userspace" && !answers(t, client, web, hangTimeout) {
				t.Error("without descriptors, the Service does not answer")
			}
			limit(usual.Cur)
			eventually(t, "the change takes effect", answeredBy(t, client, web, after))
		})
	}
}

// TestReadOnlyRun: where /run cannot be written, Services are served. The local socket and
// its commands are missing, and the log says so. The legacy variant of iptables cannot make
// its lock there: the process ends and names the lock.
func TestReadOnlyRun(t *testing.T) {
	for _, variant := range []string{"nftables", "iptables", "iptables-legacy", "userspace"} {
		t.Run(variant, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t)
			host, client, pod := lab.Host("node1"), lab.Host("pod-x"), lab.Host("pod-a")
			mode := modeOf(variant)
			chooseVariant(t, host, variant)
			args := []string{"-m", "sh", "-ec", `mount -t tmpfs -o ro none /run; exec "$@"`, "sh", build(t),
				"run", "--source", serviceTo(t, pod), "--mode", mode, "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16",
				"--conntrack-max-per-core=0", "--oom-score-adj=0", "--run-dir=/run/signalbox-of-a-test"}
			if variant == "iptables-legacy" {
				if out, err := runOn(host, "unshare", args...); err == nil || !strings.Contains(out, "the lock /run/xtables.lock is missing") || !strings.Contains(out, "mount the host's file") {
					t.Errorf("without its lock: %v\n%s", err, out)
				}
				return
			}
			log := start(t, host, "unshare", args...)
			eventually(t, "the log names the directory", func() bool { return log.count("mkdir /run/signalbox-of-a-test: read-only file system") > 0 })
			eventually(t, "the Service answers", answeredBy(t, client, netip.MustParseAddrPort("10.96.0.10:80"), pod))
		})
	}
}
