// SPDX-License-Identifier: Apache-2.0

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

// notRelayed are the protocols whose NodePorts are rejected on loopback: the relay there
// carries TCP only.
var notRelayed = []plan.Protocol{plan.UDP, plan.SCTP}

// rejectedCounter names the counter of a protocol's rejected packets. The names are
// kube-proxy's.
func rejectedCounter(p plan.Protocol) string { return "localhost-nodeport-rejected-" + p.String() }

const rejectOnLocalhost = "reject-on-localhost"

// toLocalhost sends packets to NodePorts on loopback to the chain of localhostChains. As
// with kube-proxy, they do not reach a program that listens there.
func (r ruleset) toLocalhost() []nft.Rule {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	return []nft.Rule{nft.NewRule(r.IsLoopback(), nft.SetPriorityFrom(idLookedUp(access.NodePort, nodePorts)), nft.GoTo(rejectOnLocalhost))}
}

// localhostChains reject and count packets that the relay on loopback cannot carry.
func (r ruleset) localhostChains() []nft.Chain {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	chain := nft.Chain{Name: rejectOnLocalhost}
	for _, p := range notRelayed {
		chain.Rules = append(chain.Rules, nft.NewRule(nft.ProtocolIs(p), nft.CountedBy(rejectedCounter(p)), r.Reject()))
	}
	chain.Rules = append(chain.Rules, nft.NewRule(nft.ClearPriority()))
	return []nft.Chain{chain}
}

// setCounters adds the counters that rules refer to, and removes other counters of an
// old table. An existing counter keeps its value.
func setCounters(t *nft.Table, rules ruleset, old *nft.Contents) {
	wanted := rules.counters()
	for _, name := range wanted {
		t.AddCounter(name)
	}
	if old == nil {
		return
	}
	for _, name := range old.Counters {
		if !slices.Contains(wanted, name) {
			t.DeleteCounter(name)
		}
	}
}

// counters names the counters that rules refer to.
func (r ruleset) counters() []string {
	if !r.Node.LocalhostNodePorts {
		return nil
	}
	var names []string
	for _, p := range notRelayed {
		names = append(names, rejectedCounter(p))
	}
	return names
}

// counterReader reads the counters of rejected packets over a connection of its own,
// which no Sync uses.
type counterReader struct {
	mu    sync.Mutex // guards table
	table *nft.Table // nil while it is not open
}

// open connects to the network namespace of the calling thread, once. Without a
// connection the counters are not reported.
func (r *counterReader) open(f *nft.IPFamily) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.table != nil {
		return
	}
	t, err := openTable(f)
	if err != nil {
		slog.Warn("nftables: rejected packets to NodePorts on loopback cannot be counted", "error", err)
		return
	}
	r.table = t
}

// rejected returns the counters that it can read.
func (r *counterReader) rejected() map[plan.Protocol]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	counts := map[plan.Protocol]uint64{}
	if r.table == nil {
		return counts
	}
	for _, p := range notRelayed {
		if n, err := r.table.CounterPackets(rejectedCounter(p)); err == nil {
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
		s.Refused = p.counters.rejected()
	}
	return s
}
