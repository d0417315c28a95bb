// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// kubeProxyModes are kube-proxy's, and for iptables the variant of the tools
// that it finds.
var kubeProxyModes = []string{"iptables-nft", "iptables-legacy", "nftables"}

// program is one process that serves node1.
type program struct {
	*cluster.Process
	name, mode string
}

// launch starts a program on node1; its log is shown if the test fails.
func (s *site) launch(name, mode string, env []string, path string, args ...string) *program {
	s.Helper()
	log := filepath.Join(s.TempDir(), name+".log")
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), env...)
	p, err := cluster.StartProcess(cmd, log, s.lab.Host("node1").Do)
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		p.Kill()
		if s.Failed() {
			s.Logf("%s in mode %s said:\n%s", name, mode, p.Tail(40))
		}
	})
	return &program{p, name, mode}
}

func (s *site) launchSignalbox(mode string) *program {
	s.Helper()
	return s.launch("signalbox", mode, nil, signalbox, "--kubeconfig", s.kubeconfig, "--hostname-override", "node1", "--mode", mode,
		"--cluster-cidr", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String(), "-v", "2")
}

// launchKubeProxy starts the real kube-proxy.
func (s *site) launchKubeProxy(mode string) *program {
	s.Helper()
	p := testbed.KubeProxy(binaries.KubeProxy, mode)
	args := append(p.Args(s.kubeconfig, ""), "-v", "2")
	return s.launch("kube-proxy", mode, s.toolsFirst(p.Tools), args[0], args[1:]...)
}

// toolsFirst is the environment in which the plain names of the iptables tools
// are those of a variant.
func (s *site) toolsFirst(variant string) []string {
	s.Helper()
	if variant == "" {
		return nil
	}
	dir, err := testbed.ToolsDir(s.TempDir(), variant)
	s.must(err)
	return []string{"PATH=" + dir + ":" + os.Getenv("PATH")}
}

// kubeProxyServes waits until kube-proxy has written its rules in both families.
func (s *site) kubeProxyServes(p *program) {
	s.Helper()
	s.eventually("kube-proxy's rules", func() error {
		log := p.Log()
		for _, family := range []string{"IPv4", "IPv6"} {
			if !strings.Contains(log, `"SyncProxyRules complete" ipFamily="`+family+`"`) {
				return fmt.Errorf("it has not synced %s", family)
			}
		}
		if strings.Contains(log, "Sync failed") {
			s.Fatal("kube-proxy failed to sync")
		}
		return nil
	})
}

// signs are texts that a kernel's rules hold only where a program serves in a
// mode.
var signs = map[string]string{
	"kube-proxy iptables-nft":    "KUBE-PROXY-CANARY",
	"kube-proxy iptables-legacy": "KUBE-PROXY-CANARY",
	"kube-proxy nftables":        "table ip6 kube-proxy",
	"signalbox nftables":         "table ip6 signalbox",
	"signalbox iptables":         "-A KUBE-SERVICES -m addrtype ! --dst-type LOCAL -j KUBE-EXTERNAL-SERVICES",
	"signalbox userspace":        "table ip6 signalbox-userspace",
}

// serves waits until signalbox has written all and removed the foreign rules.
func (s *site) serves(p *program) {
	s.Helper()
	s.eventually("signalbox in mode "+p.mode, func() error {
		for _, family := range []string{"IPv4", "IPv6"} {
			if !strings.Contains(p.Log(), `IPVS servers, addresses and ipsets" family=`+family) {
				return fmt.Errorf("it has not taken over %s", family)
			}
		}
		return nil
	})
}

// servesAlone waits until the program's rules are there, and nobody else's.
func (s *site) servesAlone(p *program) {
	s.Helper()
	wanted := signs[p.name+" "+p.mode]
	s.eventually(p.name+" in mode "+p.mode+" alone", func() error {
		select {
		case <-p.Done():
			s.Fatalf("%s ended: %v", p.name, p.Err())
		default:
		}
		rules := s.kernel()
		if !strings.Contains(rules, wanted) {
			return fmt.Errorf("%q is missing", wanted)
		}
		for who, sign := range signs {
			if sign != wanted && strings.Contains(rules, sign+"\n") || sign != wanted && strings.Contains(rules, sign+" ") {
				return fmt.Errorf("rules of %s are there: %q", who, sign)
			}
		}
		return nil
	})
}

// terminated ends a program as a supervisor does.
func (s *site) terminated(p *program) {
	s.Helper()
	if err := p.Stop(hangTimeout); err != nil && p.name == "signalbox" {
		s.Errorf("%s in mode %s did not end well: %v", p.name, p.mode, err)
	}
}

// takeoverModes are those through which a node is handed, where the old process
// overlaps with the new one and where it does not. A relay can only be replaced
// while it works: with it go its connections, and the rules that lead to it lead
// nowhere.
var takeoverModes = map[bool][]string{
	true:  {"nftables", "iptables", "userspace"},
	false: {"nftables", "iptables", "nftables"},
}

// TestTakeover exchanges what serves a node again and again, kube-proxy first
// and last, without losing a connection. In a rolling update of a DaemonSet
// the old process ends before the new one starts; with a surge they overlap.
//
// kube-proxy is last given the node by a mode whose rules are in a table of
// their own. Its nftables mode removes iptables rules under its names before it
// writes anything, whoever wrote them: there is nothing that signalbox's
// iptables mode could do.
func TestTakeover(t *testing.T) {
	for _, kubeProxyMode := range kubeProxyModes {
		for name, overlap := range map[string]bool{"one after the other": false, "overlapping": true} {
			t.Run("kube-proxy "+kubeProxyMode+", "+name, func(t *testing.T) {
				s := newSite(t, shared, "")
				svc := createBalanced(s)
				r := relay{site: s, overlap: overlap, runs: s.launchKubeProxy(kubeProxyMode)}
				s.kubeProxyServes(r.runs)
				checkBalanced(s, svc)
				r.exchange = s.exchange(svc)
				for _, mode := range takeoverModes[overlap] {
					r.pass("the change to signalbox in mode "+mode, func() *program {
						next := s.launchSignalbox(mode)
						s.serves(next)
						return next
					})
				}
				if r.runs.mode == "userspace" {
					r.exchange.losesRelay()
				}
				r.pass("the way back to kube-proxy", func() *program {
					next := s.launchKubeProxy(kubeProxyMode)
					s.kubeProxyServes(next)
					return next
				})
				r.exchange.end()
			})
		}
	}
}

// relay hands a node from one program to the next while there is traffic.
type relay struct {
	*site
	exchange *exchange
	overlap  bool
	runs     *program
}

// pass lets the program that runs be replaced by the one that start starts and
// waits for.
func (r *relay) pass(what string, start func() *program) {
	r.Helper()
	r.exchange.does(what, func() {
		if !r.overlap {
			r.terminated(r.runs)
		}
		next := start()
		if r.overlap {
			r.exchange.passes(newConnections)
			r.terminated(r.runs)
		}
		if next.name == "kube-proxy" {
			r.cleanup() // once signalbox has ended
		}
		r.servesAlone(next)
		r.runs = next
	})
}

// kube-proxy is started where a signalbox has ended and left its rules. From
// then on kube-proxy's endpoints are taken, also before signalbox's rules are
// removed.
func TestKubeProxyPrevails(t *testing.T) {
	for _, kubeProxyMode := range kubeProxyModes {
		for name, before := range map[string]bool{"for the first time": false, "again": true} {
			t.Run("kube-proxy "+kubeProxyMode+" "+name, func(t *testing.T) {
				s := newSite(t, shared, "")
				svc := s.createService("web", []string{"pod-a"}, asNodePort)
				if before {
					// Its hooks are made before those of signalbox.
					p := s.launchKubeProxy(kubeProxyMode)
					s.kubeProxyServes(p)
					s.terminated(p)
				}
				p := s.launchSignalbox("nftables")
				s.servesAlone(p)
				s.reaches(svc, "pod-a")
				p.Kill()
				p = s.launchKubeProxy(kubeProxyMode)
				s.kubeProxyServes(p)
				s.setEndpoints("web", []string{"pod-b", "pod-c"})
				s.reaches(svc, "pod-b", "pod-c")
				s.cleanup()
				s.servesAlone(p)
				s.reaches(svc, "pod-b", "pod-c")
			})
		}
	}
}

// What signalbox wrote is gone to the last chain when kube-proxy has the node
// back, and what kube-proxy wrote before is when signalbox has cleaned up.
func TestNothingIsLeft(t *testing.T) {
	for _, kubeProxyMode := range kubeProxyModes {
		for _, mode := range []string{"nftables", "iptables"} {
			t.Run("kube-proxy "+kubeProxyMode+", signalbox "+mode, func(t *testing.T) {
				s := newSite(t, shared, "")
				bare := s.sortedKernel()
				svc := createBalanced(s)
				p := s.launchKubeProxy(kubeProxyMode)
				s.kubeProxyServes(p)
				before := s.sortedKernel()
				if len(before) < len(bare)+30 {
					t.Fatalf("kube-proxy wrote only %q", before)
				}
				s.terminated(p)
				p = s.launchSignalbox(mode)
				s.serves(p)
				s.terminated(p)
				p = s.launchKubeProxy(kubeProxyMode)
				s.kubeProxyServes(p)
				s.reaches(svc, "pod-a", "pod-c")
				s.cleanup()
				if diff := cmp.Diff(before, s.sortedKernel()); diff != "" {
					t.Errorf("kube-proxy's rules (-before signalbox +after)\n%s", diff)
				}
				s.terminated(p)
				s.cleanup("--kube-proxy")
				if diff := cmp.Diff(bare, s.sortedKernel()); diff != "" {
					t.Errorf("(-before anybody +after cleanup --kube-proxy)\n%s", diff)
				}
			})
		}
	}
}

var passing = regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]|counter packets \d+ bytes \d+`)

// sortedKernel is the kernel's rules without counters, and without what the
// tools leave of tables that were in use once: built-in chains without rules,
// and the kubelet's share. Its lines are sorted, as the order of chains says
// nothing; the tests of connections speak for that of rules.
func (s *site) sortedKernel() []string {
	s.Helper()
	var lines []string
	for line := range strings.Lines(passing.ReplaceAllString(s.kernel(), "")) {
		if keep := strings.TrimSpace(line); keep != "" && !idle.MatchString(keep) {
			lines = append(lines, keep)
		}
	}
	slices.Sort(lines)
	return lines
}

// idle are lines that say nothing about Services.
var idle = regexp.MustCompile(`^(\*.*|COMMIT|:[A-Z]+ ACCEPT.*|\}|type .* hook .*|table .*|chain (INPUT|OUTPUT|FORWARD|PREROUTING|POSTROUTING) \{|.*KUBE-FIREWALL.*|ip saddr != 127.0.0.0/8 .*)$`)

// A kube-proxy that is not ended after all writes its rules again, and ends
// some time later. Signalbox has the node for itself in the end, with its own
// endpoints.
func TestKubeProxyLingers(t *testing.T) {
	for _, kubeProxyMode := range kubeProxyModes {
		for _, mode := range []string{"nftables", "iptables"} {
			t.Run("kube-proxy "+kubeProxyMode+", signalbox "+mode, func(t *testing.T) {
				s := newSite(t, shared, "")
				svc := createBalanced(s)
				lingering := s.launchKubeProxy(kubeProxyMode)
				s.kubeProxyServes(lingering)
				e := s.exchange(svc)
				p := s.launchSignalbox(mode)
				e.does("the takeover", func() { s.serves(p) })
				e.does("changes of another Service", func() {
					for i := range 3 {
						name := fmt.Sprintf("other-%d", i)
						s.reaches(s.createService(name, []string{"pod-b"}), "pod-b")
					}
				})
				e.does("the end of kube-proxy", func() { s.terminated(lingering) })
				s.servesAlone(p)
				e.end()
				s.setEndpoints("other-1", []string{"pod-c"})
				s.reaches(s.service("other-1"), "pod-c")
			})
		}
	}
}

// cleanup runs `signalbox cleanup` on node1.
func (s *site) cleanup(flags ...string) {
	s.Helper()
	err := s.lab.Host("node1").Do(func() error {
		out, err := exec.Command(signalbox, append([]string{"cleanup"}, flags...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	s.must(err)
}
