// SPDX-License-Identifier: Apache-2.0

package proxier

import (
	"context"

	"signalbox/proxier/plan"
)

// TakenOver names objects of kube-proxy that a mode uses as its own. The removal of
// what kube-proxy left leaves them alone.
type TakenOver struct {
	// IPTables is the variant of the iptables tools ("nft" or "legacy") in whose
	// tables the mode fills chains with kube-proxy's names; empty for none.
	IPTables string
	// IPVS: the device kube-ipvs0 and the virtual servers at its addresses.
	IPVS bool
}

// Remnant is one kind of objects that kube-proxy leaves on a node. taken names the
// objects that the mode at work has taken over: they count as signalbox's.
type Remnant struct {
	// What names the objects in messages.
	What string
	// Found says whether kube-proxy has written such objects since they were last
	// removed.
	Found func(ctx context.Context, f plan.Family, taken TakenOver) bool
	// Remove removes the objects of a family, and has the results and the drain of
	// Mode's Cleanup.
	Remove func(f plan.Family, taken TakenOver, drain bool) (removed bool, draining int, err error)
}
