// Package kubeproxy recognises and removes what kube-proxy leaves on a node, in any
// of its modes.
package kubeproxy

import (
	"context"

	"signalbox/iptables"
	"signalbox/ipvs"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Remnant is one kind of objects that kube-proxy has in the kernel. taken names the
// objects that the mode at work has taken over: they count as signalbox's.
type Remnant struct {
	// What names the objects in messages.
	What string
	// Found says whether kube-proxy has written such objects since they were last
	// removed.
	Found func(ctx context.Context, f plan.Family, taken proxier.TakenOver) bool
	// Remove removes the objects of a family, and has the results and the drain of
	// proxier.Mode's Cleanup.
	Remove func(f plan.Family, taken proxier.TakenOver, drain bool) (removed bool, draining int, err error)
}

// Remnants lists all kinds in the order in which they are removed: rules of
// iptables use the ipsets.
var Remnants = []Remnant{
	{
		What: "kube-proxy's iptables rules",
		Found: func(ctx context.Context, f plan.Family, taken proxier.TakenOver) bool {
			return iptables.HasKubeProxy(ctx, f, iptables.Backend(taken.IPTables))
		},
		Remove: func(f plan.Family, taken proxier.TakenOver, _ bool) (removed bool, draining int, err error) {
			removed, err = iptables.CleanupKubeProxy(f, iptables.Backend(taken.IPTables))
			return removed, 0, err
		},
	},
	{
		What:  "kube-proxy's nftables table",
		Found: func(_ context.Context, f plan.Family, _ proxier.TakenOver) bool { return nftables.HasKubeProxy(f) },
		Remove: func(f plan.Family, _ proxier.TakenOver, _ bool) (removed bool, draining int, err error) {
			removed, err = nftables.CleanupKubeProxy(f)
			return removed, 0, err
		},
	},
	{
		What:  "kube-proxy's IPVS servers, addresses and ipsets",
		Found: func(_ context.Context, f plan.Family, _ proxier.TakenOver) bool { return ipvs.HasKubeProxy(f) },
		Remove: func(f plan.Family, taken proxier.TakenOver, drain bool) (removed bool, draining int, err error) {
			return ipvs.CleanupKubeProxy(f, taken.IPVS, drain)
		},
	},
}
