package userspace

import (
	"log/slog"
	"net/netip"

	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// adopt takes over the numbers that frontends have in the existing table, of this
// process or an earlier one: the conntrack entries of UDP flows contain them. read
// lists a set of the table.
func (p *Proxier) adopt(st *state, desired *plan.Plan, read func(set nft.SetID) ([]nftables.SetElement, error)) {
	wanted := map[plan.FrontendKey]bool{}
	for name, sp := range desired.Services {
		if relayed(name.Protocol) {
			for _, k := range keysOf(sp) {
				wanted[k] = true
			}
		}
	}
	// The table comes first: another process may have written it since.
	for _, set := range []nft.SetID{frontends, nodePorts} {
		elements, err := read(set)
		if err != nil && p.state != nil {
			break
		}
		if err != nil {
			slog.Warn("userspace: the old table cannot be read and frontends get new numbers; UDP clients that keep their port may get no answer for two minutes",
				"family", p.family.Family.String(), "error", err)
			return
		}
		for _, e := range elements {
			k := access.FrontendOfBytes(p.family, e.Key, set == nodePorts)
			a, _ := netip.AddrFromSlice(e.Val)
			if id, ok := idOf(p.family.Family, a); ok && wanted[k] && st.pool.Claim(uint32(id)) {
				st.ids[k] = id
			}
		}
	}
	if p.state != nil {
		for k, id := range p.state.ids {
			if _, numbered := st.ids[k]; wanted[k] && !numbered && st.pool.Claim(uint32(id)) {
				st.ids[k] = id
			}
		}
	}
}
