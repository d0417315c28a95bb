package ipvs

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Render prints what New and one Sync would make of plan on a node that holds
// none of the Services' addresses itself, as what `ip -batch`, `ipvsadm
// --restore` and `nft -f` read. It touches no kernel. A plan that Sync would
// refuse renders as a comment that says why.
func Render(opts proxier.Options, desired *plan.Plan) string {
	f := nft.FamilyOf(opts.Family)
	rules := rulesetOf(f, opts.MasqueradeMark, desired.Node, timeoutsOf(desired))
	st := newState(rules)
	st.others = map[netip.Addr]bool{}
	p := &Proxier{IPFamily: f, mark: opts.MasqueradeMark, schedulers: newSchedulers(opts.IPVS.Scheduler, nil)}
	err := access.ValidateNode(rules.IPFamily, rules.Node)
	var b *batch
	if err == nil {
		names := slices.SortedFunc(maps.Keys(desired.Services), plan.ServicePortName.Compare)
		b, err = st.stage(desired, names, p.compiler(st, func(markKey) uint32 { return 0 }))
	}
	if err != nil {
		return fmt.Sprintf("# cannot be programmed: %v\n", err)
	}
	var out strings.Builder
	fmt.Fprintf(&out, "# ip -batch\nlink add %s type dummy\n", deviceName)
	slices.SortFunc(b.newVIPs, netip.Addr.Compare)
	for _, a := range b.newVIPs {
		fmt.Fprintf(&out, "addr add %s/%d dev %s\n", a, a.BitLen(), deviceName)
		b.add = append(b.add, vipElement(a))
	}
	out.WriteString("\n# ipvsadm --restore\n")
	text := opsText(b.grow)
	if opts.Family == plan.IPv6 {
		text = strings.ReplaceAll(text, " -s ", " -6 -s ")
		text = strings.ReplaceAll(text, " -r ", " -6 -r ")
	}
	out.WriteString(text + "\n# nft -f\n")
	elements := bySet(append(rules.NodeElements(), b.add...))
	out.WriteString(nft.RenderTable(f, tableName, nil, newSets(), elements, rules.chains()))
	return out.String()
}
