package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"signalbox/e2e/cluster"
	"signalbox/internal/netlab"
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

// launchKubeProxy starts the real kube-proxy. Kernel settings that a network
// namespace may not change are left alone.
func (s *site) launchKubeProxy(mode string) *program {
	s.Helper()
	name, variant, _ := strings.Cut(mode, "-")
	return s.launch("kube-proxy", mode, s.toolsFirst(variant), binaries.KubeProxy, "--kubeconfig", s.kubeconfig, "--hostname-override", "node1",
		"--proxy-mode", name, "--cluster-cidr", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String(), "--detect-local-mode", "ClusterCIDR",
		"--conntrack-max-per-core", "0", "--conntrack-min", "0", "--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0",
		"--nodeport-addresses", "primary", "--oom-score-adj", "0", "-v", "2")
}

// toolsFirst is the environment in which the plain names of the iptables tools
// are those of a variant.
func (s *site) toolsFirst(variant string) []string {
	s.Helper()
	if variant == "" {
		return nil
	}
	dir := s.TempDir()
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(family + "-" + variant + tool)
			s.must(err)
			s.must(os.Symlink(path, filepath.Join(dir, family+tool)))
		}
	}
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
	"signalbox iptables":         "-A KUBE-SERVICES -j KUBE-EXTERNAL-SERVICES",
	"signalbox userspace":        "table ip6 signalbox-userspace",
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
	if err := p.Stop(patience); err != nil && p.name == "signalbox" {
		s.Errorf("%s in mode %s did not end well: %v", p.name, p.mode, err)
	}
}

// TestTakeover exchanges what serves a node again and again, kube-proxy first
// and last, without losing a connection. In a rolling update of a DaemonSet
// the old process ends before the new one starts; with a surge they overlap.
func TestTakeover(t *testing.T) {
	for _, kubeProxyMode := range kubeProxyModes {
		for name, overlap := range map[string]bool{"one after the other": false, "overlapping": true} {
			t.Run("kube-proxy "+kubeProxyMode+", "+name, func(t *testing.T) {
				s := newSite(t, shared, "")
				svc := createBalanced(s)
				old := s.launchKubeProxy(kubeProxyMode)
				s.kubeProxyServes(old)
				checkBalanced(s, svc)
				e := s.exchange(svc)
				follow := func(what string, start func() *program) {
					e.does(what, func() {
						if !overlap {
							s.terminated(old)
						}
						next := start()
						if overlap {
							e.passes(newConnections)
							s.terminated(old)
						}
						s.servesAlone(next)
						old = next
					})
				}
				for _, mode := range []string{"nftables", "iptables"} {
					follow("the change to signalbox in mode "+mode, func() *program { return s.launchSignalbox(mode) })
				}
				e.does("the way back to kube-proxy", func() {
					if !overlap {
						s.terminated(old)
					}
					next := s.launchKubeProxy(kubeProxyMode)
					s.kubeProxyServes(next)
					if overlap {
						s.terminated(old)
					}
					s.cleanup()
					s.servesAlone(next)
				})
				e.end()
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
