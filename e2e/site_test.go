// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"k8s.io/apimachinery/pkg/util/wait"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// hangTimeout ends a test that hangs. It is longer than a slow machine needs.
const hangTimeout = 3 * time.Minute

// site is a lab whose node1 runs signalbox in one mode, and the objects that a
// test has made in its cluster.
type site struct {
	*testing.T
	*objects
	mode  string
	relay *cluster.Relay

	// entrance is where the API server is reached from the lab.
	entrance   string
	kubeconfig string
	log        string
	proxy      *cluster.Process // nil while it does not run
}

// inEachMode runs a test once per mode, on a lab of its own.
func inEachMode(t *testing.T, test func(s *site)) {
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) { test(newSite(t, shared, mode)) })
	}
}

// newSite makes the lab with both Nodes in the API; signalbox does not run yet.
func newSite(t *testing.T, c *cluster.Cluster, mode string) *site {
	t.Helper()
	if err := cluster.NeverCached(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bed, err := testbed.New(c, netlab.Options{}, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bed.Close() })
	lab := bed.Lab
	s := &site{
		T: t, mode: mode, objects: newObjects(t, c, lab), relay: bed.Relay, entrance: bed.APIServer,
		kubeconfig: bed.Kubeconfig, log: filepath.Join(dir, "signalbox.log"),
	}
	s.createNode("node1", lab.Host("node1").Addr, netlab.NodePodNetwork("node1"))
	s.createNode("node2", lab.Host("node2").Addr, netlab.NodePodNetwork("node2"))
	t.Cleanup(s.report)
	return s
}

// report ends signalbox and shows its log where the test failed.
func (s *site) report() {
	if s.proxy != nil {
		s.terminate()
	}
	if !s.Failed() {
		return
	}
	log, err := os.ReadFile(s.log)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.Error(err)
	}
	s.Logf("signalbox said:\n%s", log)
}

// start runs signalbox on node1. flags come after those that every test needs.
func (s *site) start(flags ...string) {
	s.Helper()
	args := append([]string{
		"--kubeconfig", s.kubeconfig, "--hostname-override", "node1", "--mode", s.mode,
		"--cluster-cidr", netlab.PodNetwork.V4.String() + "," + netlab.PodNetwork.V6.String(), "-v", "2",
	}, flags...)
	var err error
	s.proxy, err = cluster.StartProcess(exec.Command(signalbox, args...), s.log, s.lab.Host("node1").Do)
	if err != nil {
		s.Fatal(err)
	}
}

// terminate ends signalbox as a supervisor does, and wants it to agree.
func (s *site) terminate() {
	s.Helper()
	if err := s.proxy.Stop(hangTimeout); err != nil {
		s.Errorf("signalbox did not end well on SIGTERM: %v", err)
	}
	s.proxy = nil
}

// crash ends signalbox without asking it.
func (s *site) crash() {
	s.proxy.Signal(syscall.SIGKILL)
	<-s.proxy.Done()
	s.proxy = nil
}

// eventually waits until check has nothing to say any more.
func (s *site) eventually(what string, check func() error) {
	s.Helper()
	var last error
	err := wait.PollUntilContextTimeout(s.Context(), 20*time.Millisecond, hangTimeout, true, func(context.Context) (bool, error) {
		if s.proxy != nil {
			select {
			case <-s.proxy.Done():
				return false, fmt.Errorf("signalbox ended: %w", s.proxy.Err())
			default:
			}
		}
		last = check()
		return last == nil, nil
	})
	if err != nil {
		s.Fatalf("%s: %v; last seen: %v", what, err, last)
	}
}

// memory is the line of /proc/PID/status that says how much of it signalbox has
// in use, at most since it started.
func (s *site) memory() string {
	s.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.proxy.Pid()))
	s.must(err)
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmHWM:") {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return "unknown"
}

// kernel is what nft and both kinds of iptables print on node1.
func (s *site) kernel() string {
	s.Helper()
	var all strings.Builder
	for _, command := range []string{
		"nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save",
	} {
		err := s.lab.Host("node1").Do(func() error {
			words := strings.Fields(command)
			cmd := exec.Command(words[0], words[1:]...)
			out, err := cmd.Output()
			all.Write(out)
			return err
		})
		if err != nil {
			s.Fatalf("%s: %v", command, err)
		}
	}
	return all.String()
}

// generation is the kernel's count of transactions of nf_tables on node1. A
// program that listens to changes of rules is told it with each.
func (s *site) generation() (count string) {
	s.Helper()
	s.must(s.lab.Host("node1").Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		gen, err := conn.GetGen()
		if err != nil {
			return err
		}
		count = fmt.Sprint(gen.ID)
		return nil
	}))
	return count
}
