// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/internal/xtables"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// eachVariant runs the test for both families and both variants of the tools.
func eachVariant(t *testing.T, test func(t *testing.T, p *Proxier)) {
	for _, b := range []Backend{Legacy, NFT} {
		for _, f := range plan.Families {
			t.Run(string(b)+f.String(), func(t *testing.T) {
				nstest.Enter(t)
				test(t, newProxier(t, f, b))
			})
		}
	}
}

func newProxier(t testing.TB, f plan.Family, b Backend) *Proxier {
	t.Helper()
	p, err := New(proxier.Options{Family: f}, Tuning{Backend: b, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func mustSync(t testing.TB, p *Proxier, plan *plan.Plan, change plan.Change) {
	t.Helper()
	if err := p.Sync(context.Background(), plan, change); err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	return string(out)
}

var counters = regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]`)

// saved is what the kernel holds, without dates and counters.
func saved(t testing.TB, p *Proxier) string {
	t.Helper()
	var s string
	for table := range tableCount {
		s += run(t, "", p.tools.Save, "-t", table.String())
	}
	return counters.ReplaceAllString(s, "")
}

// sortedLines compares tables in which chains stand in another order; the
// order of rules in a chain is in the lines before.
func sortedLines(s string) string {
	order := map[string]int{}
	lines := strings.Split(s, "\n")
	table := ""
	for i, line := range lines {
		if strings.HasPrefix(line, "*") {
			table = line
		}
		if chain, ok := strings.CutPrefix(line, "-A "); ok {
			chain, _, _ = strings.Cut(chain, " ")
			order[table+chain]++
			line = strings.Repeat("+", order[table+chain]) + line
		}
		lines[i] = table + " " + line
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestChangesEqualFullWrite compares the kernel after random changes with the
// kernel after one sync of everything.
func TestChangesEqualFullWrite(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 3)
		desired := w.plan(60)
		mustSync(t, p, desired, plan.Change{})
		for range 6 {
			mustSync(t, p, desired, w.change(desired))
			compareCounts(t, p)
		}
		changed := saved(t, p)
		if _, err := Cleanup(p.opts.Family); err != nil {
			t.Fatal(err)
		}
		if left := saved(t, p); strings.Contains(left, "KUBE-") {
			t.Fatalf("Cleanup left\n%s", left)
		}
		mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{All: true})
		if diff := cmp.Diff(sortedLines(saved(t, p)), sortedLines(changed)); diff != "" {
			t.Errorf("-full write +changes\n%s", diff)
		}
	})
}

// compareCounts fails unless Counts are the rules in the kernel, where nobody
// else has any.
func compareCounts(t *testing.T, p *Proxier) {
	t.Helper()
	want, got := map[string]int{}, map[string]int{}
	for table := range tableCount {
		saved := run(t, "", p.tools.Save, "-t", table.String())
		for line := range strings.Lines(saved) {
			// The rule that protects 127.0.0.0/8 is the kubelet's as well.
			if strings.HasPrefix(line, "-A ") && !strings.Contains(line, "KUBE-FIREWALL") {
				want[table.String()]++
			}
		}
	}
	for _, k := range p.Counts() {
		got[k.Table] = k.Count
		if k.Written == 0 && k.Table == nat.String() {
			t.Errorf("nothing was written to table %s", k.Table)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("Counts (- in the kernel, + counted):\n%s", diff)
	}
}

// kubeProxyRules is a node as kube-proxy leaves it, with Services that are
// gone, and another proxy's leavings.
func kubeProxyRules(f plan.Family) string {
	pod := "10.9.9.9"
	if f == plan.IPv6 {
		pod = "fd00:9::9"
	}
	return `*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-SXIVWICOYRO3J4NJ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-SXIVWICOYRO3J4NJ -s ` + pod + ` -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d ` + pod + ` -p tcp -m tcp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SVC-XPGD46QRK7WJZT7O -m comment --comment "ns1/svc1:p80" -j KUBE-SEP-SXIVWICOYRO3J4NJ
COMMIT
`
}

// foreignRules are of other software, some of it near to ours.
const foreignRules = `*filter
:CNI-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "mine" -j CNI-FORWARD
-A FORWARD -m comment --comment "kubernetes service portals" -j ACCEPT
-A CNI-FORWARD -p tcp -m tcp --dport 25 -j DROP
COMMIT
*nat
:CNI-HOSTPORT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -p tcp -m tcp --dport 8081 -j CNI-HOSTPORT
-A CNI-HOSTPORT -j RETURN
-A POSTROUTING -p udp -m udp --dport 5353 -j MASQUERADE
COMMIT
`

func TestTakesOverFromKubeProxyAndGivesBack(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		restore := func(rules string) { t.Helper(); run(t, rules, p.tools.Restore, "--noflush") }
		restore(kubeProxyRules(p.opts.Family))
		// Somebody's rule that is in the way of removing a chain.
		restore("*nat\n:KUBE-SVC-USED - [0:0]\n-A INPUT -j KUBE-SVC-USED\nCOMMIT\n")
		w := newWorld(p.opts.Family, 5)
		desired := w.plan(70)
		mustSync(t, p, desired, plan.Change{All: true})
		after := saved(t, p)
		for _, gone := range []string{"KUBE-SEP-SXIVWICOYRO3J4NJ", "KUBE-SVC-XPGD46QRK7WJZT7O"} {
			if strings.Contains(after, gone) {
				t.Errorf("chain %s of a Service that is gone is still there", gone)
			}
		}
		for _, j := range jumps {
			line := "-A " + j.from + j.rule() + "\n"
			nats, filters, _ := strings.Cut(after, "*filter")
			if n := strings.Count(map[table]string{nat: nats, filter: filters}[j.table], line); n != 1 {
				t.Errorf("%s has %d times %s", j.table, n, line)
			}
		}
		mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{All: true})
		if diff := cmp.Diff(after, saved(t, p)); diff != "" {
			t.Errorf("a restart changes the rules:\n%s", diff)
		}

		// kube-proxy rewrites its chains of the nat table and removes all that
		// have its prefixes.
		l, err := p.tools.List(context.Background(), "nat", isOurs)
		if err != nil {
			t.Fatal(err)
		}
		var back xtables.Script
		chains := []chain{{Name: servicesChain}, {Name: nodePortsChain}, {Name: postroutingChain}}
		for _, name := range staleChains(l) {
			chains = append(chains, xtables.Removal(name))
		}
		back.Add("nat", chains)
		restore(back.String())
		for _, chain := range regexp.MustCompile(`(?m)^:KUBE-\S+`).FindAllString(run(t, "", p.tools.Save, "-t", "nat"), -1) {
			if isServiceChain(chain[1:]) && chain != ":KUBE-SVC-USED" {
				t.Errorf("kube-proxy would leave %s behind", chain)
			}
		}
	})
}

func TestForeignRulesStay(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		run(t, foreignRules, p.tools.Restore, "--noflush")
		before := saved(t, p)
		w := newWorld(p.opts.Family, 8)
		desired := w.plan(50)
		mustSync(t, p, desired, plan.Change{All: true})
		mustSync(t, p, desired, w.change(desired))
		present := saved(t, p)
		for _, line := range strings.Split(before, "\n") {
			if !strings.Contains(present, line+"\n") {
				t.Errorf("%q is gone", line)
			}
		}
		if _, err := Cleanup(p.opts.Family); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, saved(t, p)); diff != "" {
			t.Errorf("Cleanup leaves (-before +after)\n%s", diff)
		}
		if _, err := Cleanup(p.opts.Family); err != nil {
			t.Errorf("nothing to clean up: %v", err)
		}
	})
}

// TestCleanupLeavesWhatOthersUse: a rule of other software that marks for
// masquerade goes on doing so.
func TestCleanupLeavesWhatOthersUse(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 8)
		desired := w.plan(5)
		desired.Node.RouteSources = w.routeSources()
		mustSync(t, p, desired, plan.Change{All: true})
		run(t, "*nat\n:CNI-X - [0:0]\n:CNI-Y - [0:0]\n-A CNI-X -p tcp -j KUBE-MARK-MASQ\n-A PREROUTING -j CNI-X\n-A CNI-Y -j KUBE-POSTROUTING\n-A POSTROUTING -j CNI-Y\nCOMMIT\n", p.tools.Restore, "--noflush")
		for range 2 {
			if _, err := Cleanup(p.opts.Family); err != nil {
				t.Fatal(err)
			}
		}
		left := saved(t, p)
		if !strings.Contains(left, "kubernetes service traffic requiring SNAT") || strings.Contains(left, "-A "+hairpinChain) || strings.Contains(left, "-A "+routeSourcesChain) {
			t.Errorf("KUBE-POSTROUTING after Cleanup:\n%s", left)
		}
		if !strings.Contains(left, "-A CNI-X -p tcp -j KUBE-MARK-MASQ\n") || !strings.Contains(left, "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n") {
			t.Errorf("after Cleanup:\n%s", left)
		}
		if strings.Contains(left, "KUBE-SERVICES") {
			t.Errorf("Cleanup left\n%s", left)
		}
	})
}

func onlyService(w *world, endpoint string) *plan.ServicePort {
	set := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.MustParseAddrPort(endpoint)}}}
	return &plan.ServicePort{
		Name:      plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "ns", Name: "bad"}, Port: "web", Protocol: plan.TCP},
		Frontends: []plan.Frontend{{Addr: w.addr(97, 1), Port: 80, Internal: set, External: set}},
	}
}

// TestFailureNamesTheServiceAndIsUndone gives the tools an endpoint that they
// refuse.
func TestFailureNamesTheServiceAndIsUndone(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 8)
		desired := w.plan(30)
		mustSync(t, p, desired, plan.Change{All: true})
		before := saved(t, p)
		good, bad := "10.1.0.1:80", "[fd00::1]:80"
		if p.opts.Family == plan.IPv6 {
			good, bad = bad, good
		}
		sp := onlyService(w, bad)
		desired.Services[sp.Name] = sp
		change := plan.Change{Services: []plan.ServicePortName{sp.Name}}
		err := p.Sync(context.Background(), desired, change)
		if err == nil || errors.Is(err, proxier.ErrUnknownState) || !strings.Contains(err.Error(), "ns/bad:web") {
			t.Errorf("Sync says %v", err)
		}
		if diff := cmp.Diff(before, saved(t, p)); diff != "" {
			t.Errorf("a refused change changed\n%s", diff)
		}

		// With a Service that must be refused in the filter table first.
		empty := onlyService(w, good)
		empty.Name.Name = "empty"
		empty.Frontends[0].Addr = w.addr(97, 2)
		empty.Frontends[0].Internal, empty.Frontends[0].External = nil, nil
		desired.Services[empty.Name] = empty
		change.Services = append(change.Services, empty.Name)
		if err := p.Sync(context.Background(), desired, change); !errors.Is(err, proxier.ErrUnknownState) || !strings.Contains(err.Error(), "ns/bad:web") {
			t.Errorf("Sync of two tables, of which the second is refused, says %v", err)
		}

		sp = onlyService(w, good)
		desired.Services[sp.Name] = sp
		mustSync(t, p, desired, plan.Change{All: true})
		repaired := saved(t, p)
		fresh := newProxier(t, p.opts.Family, p.tools.Backend)
		mustSync(t, fresh, desired, plan.Change{All: true})
		if diff := cmp.Diff(sortedLines(saved(t, p)), sortedLines(repaired)); diff != "" {
			t.Errorf("after the failures (-fresh +repaired)\n%s", diff)
		}
	})
}

// TestLockHeldByAnother: only the legacy tools have the lock.
func TestLockHeldByAnother(t *testing.T) {
	nstest.Enter(t)
	path := filepath.Join(t.TempDir(), "xtables.lock")
	t.Setenv("XTABLES_LOCKFILE", path)
	p := newProxier(t, plan.IPv4, Legacy)
	p.tools.Wait = time.Second
	w := newWorld(plan.IPv4, 1)
	desired := w.plan(3)
	mustSync(t, p, desired, plan.Change{All: true})

	lock, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	sp := onlyService(w, "10.1.0.1:80")
	desired.Services[sp.Name] = sp
	change := plan.Change{Services: []plan.ServicePortName{sp.Name}}
	err = p.Sync(context.Background(), desired, change)
	if err == nil || !strings.Contains(err.Error(), "lock") || !strings.Contains(err.Error(), path) || errors.Is(err, proxier.ErrUnknownState) {
		t.Errorf("with the lock held Sync says %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.Sync(ctx, desired, change); !errors.Is(err, context.Canceled) {
		t.Errorf("a Sync that is stopped says %v", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	mustSync(t, p, desired, change)
	if !strings.Contains(saved(t, p), `ns/bad:web cluster IP`) {
		t.Error("the Service is not there when the lock is free again")
	}
}

func TestBackendFollowsTheNode(t *testing.T) {
	cases := []struct {
		name  string
		setup map[string]string // tool -> its input
		want  Backend
	}{
		{"hint in legacy", map[string]string{"legacy": "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", "nft": foreignRules}, Legacy},
		{"hint in nft", map[string]string{"nft": "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", "legacy": foreignRules}, NFT},
		{"hint before canary", map[string]string{"legacy": "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", "nft": "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"}, Legacy},
		{"canary in legacy", map[string]string{"legacy": "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"}, Legacy},
		{"more rules in legacy", map[string]string{"legacy": foreignRules, "nft": "*filter\n-A INPUT -j ACCEPT\nCOMMIT\n"}, Legacy},
		{"more rules in nft", map[string]string{"nft": foreignRules, "legacy": "*filter\n-A INPUT -j ACCEPT\nCOMMIT\n"}, NFT},
	}
	for _, f := range plan.Families {
		for _, c := range cases {
			t.Run(f.String()+" "+c.name, func(t *testing.T) {
				nstest.Enter(t)
				for tool, rules := range c.setup {
					run(t, rules, xtables.CommandName(f)+"-"+tool+"-restore", "--noflush")
				}
				var log bytes.Buffer
				p, err := New(proxier.Options{Family: f}, Tuning{Logger: slog.New(slog.NewTextHandler(&log, nil))})
				if err != nil {
					t.Fatal(err)
				}
				if p.tools.Backend != c.want || !strings.Contains(log.String(), "backend="+string(c.want)) {
					t.Errorf("chose %s, logged %s", p.tools.Backend, log.String())
				}
			})
		}
	}
}

func TestSupported(t *testing.T) {
	nstest.Enter(t)
	for _, f := range plan.Families {
		if err := new(Dataplane).Supported(f); err != nil {
			t.Errorf("%s: %v", f, err)
		}
		for _, b := range []Backend{Legacy, NFT} {
			p := newProxier(t, f, b)
			if err := probe(p.tools, features(f)); err != nil {
				t.Errorf("%s %s: %v", b, f, err)
			}
			if left := saved(t, p); strings.Contains(left, probeChain) {
				t.Errorf("the probe left\n%s", left)
			}
		}
		_, err := New(proxier.Options{Family: f}, Tuning{Backend: "other"})
		var unsupported *proxier.UnsupportedError
		if !errors.As(err, &unsupported) || !strings.Contains(err.Error(), xtables.CommandName(f)+"-other") {
			t.Errorf("without the tools New says %v", err)
		}
	}
}

// TestMissingFeatureIsNamed lets the probe ask for what no kernel has.
func TestMissingFeatureIsNamed(t *testing.T) {
	nstest.Enter(t)
	for _, b := range []Backend{Legacy, NFT} {
		err := probe(newProxier(t, plan.IPv4, b).tools, append(features(plan.IPv4), feature{"the target NOSUCH", nat, " -j NOSUCH"}))
		var unsupported *proxier.UnsupportedError
		if !errors.As(err, &unsupported) || unsupported.Missing != "the target NOSUCH" {
			t.Errorf("%s: %v", b, err)
		}
	}
}

func TestLocalhostNodePorts(t *testing.T) {
	for _, b := range []Backend{Legacy, NFT} {
		t.Run(string(b), func(t *testing.T) {
			nstest.Enter(t)
			p := newProxier(t, plan.IPv4, b)
			// As the kubelet writes it.
			run(t, "*filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\n-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\""+
				" --dst 127.0.0.0/8 ! --src 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\nCOMMIT\n", p.tools.Restore, "--noflush")
			desired := planOf(plan.IPv4)
			desired.Node.NodePortAddrs.All = true
			mustSync(t, p, desired, plan.Change{All: true})
			if rules := saved(t, p); !strings.Contains(rules, "-A KUBE-SERVICES ! -d 127.0.0.0/8 ") {
				t.Errorf("NodePorts are served on 127.0.0.1:\n%s", rules)
			}
			desired.Node.LocalhostNodePorts = true
			mustSync(t, p, desired, plan.Change{Node: true})
			rules := saved(t, p)
			for text, times := range map[string]int{"block incoming localnet connections": 1, "-A INPUT -j KUBE-FIREWALL\n": 1, "-A OUTPUT -j KUBE-FIREWALL\n": 1, "! -d 127.0.0.0/8 -m comment": 0} {
				if n := strings.Count(rules, text); n != times {
					t.Errorf("%d times %q in\n%s", n, text, rules)
				}
			}
			if set, err := node.Sysctl(routeLocalnet); err != nil || set != "1" {
				t.Errorf("route_localnet is %q, %v", set, err)
			}
			if problems := p.KernelProblems(); len(problems) > 0 {
				t.Errorf("also %v", problems)
			}
		})
	}
}
