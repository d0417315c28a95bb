// SPDX-License-Identifier: Apache-2.0

// Package kubeproxy recognises and removes what kube-proxy leaves on a node, in any
// of its modes.
//
// This package knows the table of kube-proxy's nftables mode. Our iptables and ipvs modes
// know kube-proxy's chains, sets and virtual servers, because they have the tools for them;
// see KubeProxy of proxier.Mode.
package kubeproxy

import (
	"context"

	"signalbox/modes"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Remnants lists all kinds in the order in which they are removed.
func Remnants() []proxier.Remnant {
	var all []proxier.Remnant
	for _, m := range modes.All {
		all = append(all, m.KubeProxy()...)
	}
	return append(all, proxier.Remnant{What: "kube-proxy's nftables table", Found: hasTable, Remove: removeTable})
}

// table is that of kube-proxy's nftables mode.
const table = "kube-proxy"

func hasTable(_ context.Context, f plan.Family, _ proxier.TakenOver) bool {
	exists, err := access.HasTable(f, table)
	return err == nil && exists
}

func removeTable(f plan.Family, _ proxier.TakenOver, _ bool) (removed bool, draining int, err error) {
	removed, err = access.DropTable(f, table)
	return removed, 0, err
}
