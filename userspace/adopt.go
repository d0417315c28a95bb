package userspace

import (
	"log/slog"
	"net/netip"

	nft "github.com/google/nftables"

	"signalbox/nftables"
	"signalbox/proxier"
)

// adopt takes over the numbers that frontends have in the table that is there,
// this process's or an earlier one's: the kernel remembers them with each UDP
// flow. read lists a set of it.
func (p *Proxier) adopt(st *state, plan *proxier.Plan, read func(set int) ([]nft.SetElement, error)) {
	wanted := map[proxier.FrontendKey]bool{}
	for name, sp := range plan.Services {
		if relayed(name.Protocol) {
			for _, k := range keysOf(sp) {
				wanted[k] = true
			}
		}
	}
	// The table comes first: another process may have written it since.
	for _, set := range []int{frontends, nodePorts} {
		elements, err := read(set)
		if err != nil && p.state != nil {
			break
		}
		if err != nil {
			slog.Warn("userspace: the old table cannot be read; UDP clients that keep their port may go unanswered for two minutes",
				"family", p.family.Family.String(), "error", err)
			return
		}
		for _, e := range elements {
			k := nftables.FrontendOfBytes(p.family, e.Key, set == nodePorts)
			a, _ := netip.AddrFromSlice(e.Val)
			if id, ok := idOf(p.family.Family, a); ok && wanted[k] && st.pool.claim(id) {
				st.ids[k] = id
			}
		}
	}
	if p.state != nil {
		for k, id := range p.state.ids {
			if _, numbered := st.ids[k]; wanted[k] && !numbered && st.pool.claim(id) {
				st.ids[k] = id
			}
		}
	}
}
