package nftables

import (
	"log/slog"
	"slices"
	"sync"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// notRelayed are the protocols whose NodePorts are refused on loopback: the relay
// there carries TCP alone.
var notRelayed = []plan.Protocol{plan.UDP, plan.SCTP}

// refusedCounter names the counter of a protocol's packets that are refused. The
// names are kube-proxy's.
func refusedCounter(p plan.Protocol) string { return "localhost-nodeport-rejected-" + p.String() }

const refuseOnLocalhost = "refuse-on-localhost"

// toLocalhost leads packets for NodePorts on loopback to refuseOnLocalhost. A program
// that listens there is not asked, as with kube-proxy.
func (r ruleset) toLocalhost() []nft.Rule {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	return []nft.Rule{nft.NewRule(r.IsLoopback(), nft.SetPriorityFrom(idLookedUp(access.NodePort, nodePorts)), nft.GoTo(refuseOnLocalhost))}
}

// localhostChains refuse and count what the relay on loopback cannot carry.
func (r ruleset) localhostChains() []nft.Chain {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	refuse := nft.Chain{Name: refuseOnLocalhost}
	for _, p := range notRelayed {
		refuse.Rules = append(refuse.Rules, nft.NewRule(nft.ProtocolIs(p), nft.CountedBy(refusedCounter(p)), r.Reject()))
	}
	refuse.Rules = append(refuse.Rules, nft.NewRule(nft.ClearPriority()))
	return []nft.Chain{refuse}
}

// setCounters makes the counters that rules refer to, and removes what an old
// table has of others. One that is there goes on.
func setCounters(w *nft.Table, rules ruleset, old *nft.Contents) {
	wanted := rules.counters()
	for _, name := range wanted {
		w.AddCounter(name)
	}
	if old == nil {
		return
	}
	for _, name := range old.Counters {
		if !slices.Contains(wanted, name) {
			w.DeleteCounter(name)
		}
	}
}

// counters are the names of those that rules refer to.
func (r ruleset) counters() []string {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	var names []string
	for _, p := range notRelayed {
		names = append(names, refusedCounter(p))
	}
	return names
}

// counterReader reads the counters of refused packets, by a connection that no
// sync uses.
type counterReader struct {
	mu    sync.Mutex // guards wire
	table *nft.Table // nil while it is not open
}

// open connects to the network namespace of the calling thread, unless that has been
// done. Without a connection the counters are not reported.
func (r *counterReader) open(f *nft.IPFamily) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.table != nil {
		return
	}
	w, err := openTable(f)
	if err != nil {
		slog.Warn("nftables: refused packets to NodePorts on loopback cannot be counted", "error", err)
		return
	}
	r.table = w
}

// refused leaves out what cannot be read.
func (r *counterReader) refused() map[plan.Protocol]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts := map[plan.Protocol]uint64{}
	if r.table == nil {
		return counts
	}
	for _, p := range notRelayed {
		if n, err := r.table.CounterPackets(refusedCounter(p)); err == nil {
			counts[p] = n
		}
	}
	return counts
}

func (r *counterReader) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.table == nil {
		return nil
	}
	err := r.table.Close()
	r.table = nil
	return err
}

// LocalhostStats implements proxier.Proxier.
func (p *Proxier) LocalhostStats() proxier.LocalhostStats {
	s := p.localhost.Stats()
	if s.Serving {
		s.Refused = p.counters.refused()
	}
	return s
}
