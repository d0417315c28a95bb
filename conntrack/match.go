package conntrack

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"signalbox/proxier"
)

// flow is what matters of one entry of the connection tracking table.
type flow struct {
	// to is where the first packet was sent, from who answers it: another
	// address where the destination was translated.
	to, from netip.AddrPort
	// answered says that a reply was seen.
	answered bool
	// handle finds the entry again in the table.
	handle []byte
}

func (f *flow) translated() bool { return f.from != f.to }

// duty is what is to be done about the flows to one frontend.
type duty struct {
	serving *proxier.EndpointSet
	// until is when the duty ends; zero where no pass has yet been made for
	// it.
	until time.Time
}

// duties says for each frontend who may answer; the latest word counts.
type duties map[proxier.FrontendKey]duty

// stale says whether a flow must go. local tells the addresses of this node,
// relay those of a relay on it.
func (d duties) stale(f *flow, local, relay func(netip.Addr) bool) bool {
	key := proxier.FrontendKey{Addr: f.to.Addr(), Port: f.to.Port(), Protocol: proxier.UDP}
	if at, ok := d[key]; ok {
		return !at.keeps(f, relay)
	}
	key.Addr = netip.Addr{}
	at, ok := d[key]
	if !ok || !f.translated() && f.answered || !local(f.to.Addr()) {
		return false
	}
	return !at.keeps(f, relay)
}

// keeps says whether whoever answers the flow still does so.
func (d duty) keeps(f *flow, relay func(netip.Addr) bool) bool {
	return answers(d.serving, f.from) || d.serving.Len() > 0 && relay(f.from.Addr())
}

// answers says whether an endpoint of the set, which is sorted by address and
// port, is at a.
func answers(set *proxier.EndpointSet, a netip.AddrPort) bool {
	if set == nil {
		return false
	}
	_, found := slices.BinarySearchFunc(set.Endpoints, a, func(e proxier.Endpoint, a netip.AddrPort) int {
		return cmp.Or(e.Addr().Compare(a.Addr()), cmp.Compare(e.Port(), a.Port()))
	})
	return found
}

// nodePorts says whether any of the frontends is at every address of the node.
func (d duties) nodePorts() bool {
	for key := range d {
		if !key.Addr.IsValid() {
			return true
		}
	}
	return false
}
