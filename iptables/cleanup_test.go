// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/nstest"
	"signalbox/internal/xtables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// otherModesRules is what kube-proxy's ipvs and userspace modes leave, with
// the canaries of its iptables mode.
const otherModesRules = `*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-PROXY-CANARY - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
:KUBE-NODEPORT-NON-LOCAL - [0:0]
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A INPUT -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-A INPUT -m comment --comment "Ensure that non-local NodePort traffic can flow" -j KUBE-NODEPORT-NON-LOCAL
-A FORWARD -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-OUT-FILTER
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -j REJECT
COMMIT
*nat
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PORTALS-CONTAINER - [0:0]
:KUBE-PORTALS-HOST - [0:0]
:KUBE-NODEPORT-CONTAINER - [0:0]
:KUBE-NODEPORT-HOST - [0:0]
-A PREROUTING -m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" -j KUBE-PORTALS-CONTAINER
-A PREROUTING -m addrtype --dst-type LOCAL -m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain" -j KUBE-NODEPORT-CONTAINER
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" -j KUBE-PORTALS-HOST
-A OUTPUT -m addrtype --dst-type LOCAL -m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain" -j KUBE-NODEPORT-HOST
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -p tcp -m tcp --dport 1 -j KUBE-LOAD-BALANCER
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-NODE-PORT -p tcp -j KUBE-MARK-MASQ
COMMIT
`

// wholeSave is all that iptables-save prints, mangle table too, without dates
// and counters.
func wholeSave(t *testing.T, p *Proxier) string {
	t.Helper()
	return counters.ReplaceAllString(run(t, "", p.tools.Save), "")
}

// What is kube-proxy's goes, whatever its mode was, and nothing else changes by
// a byte.
func TestCleanupKubeProxy(t *testing.T) {
	for name, rules := range map[string]func(plan.Family) string{
		"iptables":       kubeProxyRules,
		"ipvs,userspace": func(plan.Family) string { return otherModesRules },
	} {
		t.Run(name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, p *Proxier) {
				run(t, foreignRules+"*mangle\n:KUBE-IPTABLES-HINT - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n", p.tools.Restore, "--noflush")
				before := wholeSave(t, p)
				run(t, rules(p.opts.Family), p.tools.Restore, "--noflush")
				if removed, err := cleanupKubeProxy(p.opts.Family, ""); err != nil || !removed {
					t.Fatalf("something was removed: %v, %v", removed, err)
				}
				if diff := cmp.Diff(before, wholeSave(t, p)); diff != "" {
					t.Errorf("cleanupKubeProxy leaves (-before +after)\n%s", diff)
				}
				if removed, err := cleanupKubeProxy(p.opts.Family, ""); err != nil || removed {
					t.Errorf("nothing to clean up: %v, %v", removed, err)
				}
			})
		})
	}
}

// Chains that bear names of ours too are kube-proxy's while it fills them.
func TestCleanupLeavesKubeProxysRules(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		run(t, kubeProxyRules(p.opts.Family)+otherModesRules, p.tools.Restore, "--noflush")
		before := wholeSave(t, p)
		if removed, err := Cleanup(p.opts.Family); err != nil || removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if diff := cmp.Diff(before, wholeSave(t, p)); diff != "" {
			t.Errorf("(-before +after)\n%s", diff)
		}
	})
}

// A kube-proxy that was started, and has written nothing yet but its canaries,
// finds the chains that it is about to fill.
func TestCleanupBesideStartingKubeProxy(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, newWorld(p.opts.Family, 5).plan(30), plan.Change{All: true})
		run(t, "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n", p.tools.Restore, "--noflush")
		before := wholeSave(t, p)
		if _, err := Cleanup(p.opts.Family); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, wholeSave(t, p)); diff != "" {
			t.Errorf("(-before +after)\n%s", diff)
		}
	})
}

// A takeover within one variant replaces kube-proxy's chains in place; only what
// this mode has not got remains to be removed.
func TestCleanupKubeProxyInUse(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		desired := newWorld(p.opts.Family, 5).plan(30)
		mustSync(t, p, desired, plan.Change{All: true})
		want := saved(t, p)
		if _, err := Cleanup(p.opts.Family); err != nil {
			t.Fatal(err)
		}
		run(t, otherModesRules, p.tools.Restore, "--noflush")
		mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{All: true})
		if _, err := cleanupKubeProxy(p.opts.Family, p.tools.Backend); err != nil {
			t.Fatal(err)
		}
		// Jumps that were there stay where they are.
		sorted := func(s string) []string { return slices.Sorted(strings.Lines(s)) }
		if diff := cmp.Diff(sorted(want), sorted(saved(t, p))); diff != "" {
			t.Errorf("(-never kube-proxy +after kube-proxy)\n%s", diff)
		}
		if all := wholeSave(t, p); strings.Contains(all, canaryChain) {
			t.Errorf("a canary is left:\n%s", all)
		}
	})
}

// TestCleanupKubeProxyReadsNothing: beside this mode's rules no table is listed, unless the
// kernel has a chain of kube-proxy. A listing reads all rules.
func TestCleanupKubeProxyReadsNothing(t *testing.T) {
	eachFamilyOfNFT(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, newWorld(p.opts.Family, 5).plan(30), plan.Change{All: true})
		whileNoToolStarts(p, func() {
			if removed, err := remove(t.Context(), p.tools, otherModes); removed || err != nil {
				t.Errorf("without kube-proxy: %v, %v", removed, err)
			}
		})
		run(t, "*filter\n:KUBE-NODE-PORT - [0:0]\nCOMMIT\n", p.tools.Restore, "--noflush")
		if removed, err := remove(t.Context(), p.tools, otherModes); !removed || err != nil {
			t.Errorf("with a chain of kube-proxy: %v, %v", removed, err)
		}
	})
}

// Without the tools, rules that are there are not taken for none.
func TestCleanupWithoutTools(t *testing.T) {
	for _, f := range plan.Families {
		nstest.Enter(t)
		p := newProxier(t, f, NFT)
		var missing *proxier.UnsupportedError
		if err := withoutTools(f); !errors.As(err, &missing) {
			t.Errorf("%s, with no rules: %v", f, err)
		}
		mustSync(t, p, planOf(f), plan.Change{All: true})
		if err := withoutTools(f); errors.As(err, &missing) || !strings.Contains(err.Error(), "whether signalbox or kube-proxy wrote them") || !strings.Contains(err.Error(), "image signalbox-iptables") {
			t.Errorf("%s, with rules: %v", f, err)
		}
	}
}

// A node that was upgraded may still have the rules of an earlier version.
func TestCleanupAfterEarlierVersions(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		mustSync(t, p, newWorld(p.opts.Family, 5).plan(30), plan.Change{All: true})
		run(t, "*filter\n"+strings.Replace(markerRules[0], "-A", "-D", 1)+"\n"+markerRules[1]+"\nCOMMIT\n", p.tools.Restore, "--noflush")
		if removed, err := Cleanup(p.opts.Family); err != nil || !removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if after := wholeSave(t, p); strings.Contains(after, "KUBE-SVC") || strings.Contains(after, servicesChain) {
			t.Errorf("Cleanup leaves\n%s", after)
		}
	})
}

// A process that was killed while it asked the kernel leaves chains that nothing else
// tells from kube-proxy's.
func TestCleanupAfterProbe(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		var left xtables.Script
		for table, rules := range ruleForms(p.opts.Family) {
			left.Add(table, []chain{{Name: probeChain}, {Name: probeChain + "-T", Level: 1, Rules: rules}})
		}
		if err := p.tools.Apply(t.Context(), left); err != nil {
			t.Fatal(err)
		}
		if removed, err := Cleanup(p.opts.Family); err != nil || !removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if after := wholeSave(t, p); strings.Contains(after, probeChain) {
			t.Errorf("Cleanup leaves\n%s", after)
		}
	})
}
