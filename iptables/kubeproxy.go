package iptables

import (
	"context"
	"errors"
	"slices"

	"signalbox/proxier/plan"
)

// canaryChain is in three tables while kube-proxy runs in iptables mode: it
// looks whether the chain is still there to learn that somebody flushed its
// rules.
const canaryChain = "KUBE-PROXY-CANARY"

// ipvsChains are those that only kube-proxy's ipvs mode has.
var ipvsChains = []string{
	"KUBE-LOAD-BALANCER", "KUBE-NODE-PORT", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
}

// userspaceChains are those of kube-proxy's userspace mode, up to Kubernetes
// 1.25.
var userspaceChains = []string{
	"KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST", "KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST", "KUBE-NODEPORT-NON-LOCAL",
}

// otherModes is what kube-proxy has in the tables and this mode never, whatever
// kube-proxy's mode.
var otherModes = belongings{
	owns: func(_, chain string) bool {
		return chain == canaryChain || slices.Contains(ipvsChains, chain) || slices.Contains(userspaceChains, chain)
	},
	jumps: []jump{
		{filter, "INPUT", proxyFirewallChain, false, "kube-proxy firewall rules"},
		{filter, "FORWARD", proxyFirewallChain, false, "kube-proxy firewall rules"},
		{filter, "INPUT", "KUBE-NODE-PORT", false, "kubernetes health check rules"},
		{filter, "INPUT", "KUBE-IPVS-FILTER", false, "kubernetes ipvs access filter"},
		{filter, "OUTPUT", "KUBE-IPVS-OUT-FILTER", false, "kubernetes ipvs access filter"},
		{nat, "PREROUTING", "KUBE-PORTALS-CONTAINER", false, "handle ClusterIPs; NOTE: this must be before the NodePort rules"},
		{nat, "OUTPUT", "KUBE-PORTALS-HOST", false, "handle ClusterIPs; NOTE: this must be before the NodePort rules"},
		{nat, "PREROUTING", "KUBE-NODEPORT-CONTAINER", false, "handle service NodePorts; NOTE: this must be the last rule in the chain"},
		{nat, "OUTPUT", "KUBE-NODEPORT-HOST", false, "handle service NodePorts; NOTE: this must be the last rule in the chain"},
		{filter, "INPUT", "KUBE-NODEPORT-NON-LOCAL", false, "Ensure that non-local NodePort traffic can flow"},
	},
}

// kubeProxys is all that kube-proxy has in the tables, in any of its modes.
var kubeProxys = belongings{
	owns: func(table, chain string) bool {
		return ours.owns(table, chain) || otherModes.owns(table, chain)
	},
	jumps: slices.Concat(jumps, otherModes.jumps),
}

// CleanupKubeProxy removes from both variants what kube-proxy wrote, in any of
// its modes, and leaves what Cleanup leaves. Of the variant in use, whose
// chains this mode has filled with its own rules, only the rest goes; "" for
// none. Without the tools the error is a *proxier.UnsupportedError: what is in
// the kernel may be signalbox's, and Cleanup tells of it.
func CleanupKubeProxy(f plan.Family, inUse Backend) (removed bool, err error) {
	removed, err = cleanup(f, func(ctx context.Context, t *tools) (bool, error) {
		if t.backend == inUse {
			return t.remove(ctx, otherModes)
		}
		return t.remove(ctx, kubeProxys)
	})
	if errors.Is(err, errNoTools) {
		return false, missingTools(f, nil)
	}
	return removed, err
}

// HasKubeProxy says whether kube-proxy has written rules since they were last
// removed. A kube-proxy that runs on writes what changes at once, and its
// canaries half a minute later; in the variant in use, where the names of the
// chains do not tell, these are all there is to go by.
func HasKubeProxy(ctx context.Context, f plan.Family, inUse Backend) bool {
	for _, b := range []Backend{NFT, Legacy} {
		t, err := findTools(f, b, defaultWait)
		if err != nil {
			continue
		}
		if t.hasChain(ctx, "mangle", canaryChain) || b != inUse && t.hasChain(ctx, nat.String(), servicesChain) {
			return true
		}
	}
	return false
}
