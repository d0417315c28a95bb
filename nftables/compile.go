// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"maps"
	"slices"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// compileChange lists what the table has of the changing Service ports and chains, and
// what it is to have.
func compileChange(st *state, c *pendingChange) (before, after []nft.Element) {
	for _, p := range c.ports {
		compile(p.old, func(e nft.Element) { before = append(before, e) })
		compile(p.new, func(e nft.Element) { after = append(after, e) })
	}
	for _, chain := range c.oldChains {
		before = append(before, pickElement(st, chain))
	}
	for _, chain := range c.newChains {
		after = append(after, pickElement(st, chain))
	}
	return before, after
}

// compileAll hands out the elements of the whole state and counts them. The node's
// elements are not among them.
func compileAll(st *state, emit func(nft.Element)) *access.Elements {
	elements := access.NewElements(allSets)
	add := func(e nft.Element) {
		if elements.Add(&e) {
			emit(e)
		}
	}
	for sources := plan.FromPods; sources <= plan.AnySource; sources++ {
		add(nft.Element{Set: markChains, Key: nft.MarkKey(uint32(sources)), Chain: markChain(sources)})
	}
	for _, name := range slices.SortedFunc(maps.Keys(st.ports), plan.ServicePortName.Compare) {
		compile(st.ports[name], add)
	}
	for _, chain := range st.sortedChains() {
		add(pickElement(st, chain))
	}
	return elements
}

// pickElement leads to a pick chain.
func pickElement(st *state, c pickChain) nft.Element {
	return nft.Element{Set: pickChains, Key: nft.MarkKey(st.chains[c]), Chain: c.name()}
}

// compile hands out the elements of a Service port; nil has none. Elements of shared
// sets may come more than once.
func compile(p *programmedPort, emit func(nft.Element)) {
	if p == nil {
		return
	}
	comment := nft.CommentText(p.port.Name.String())
	for i := range p.port.Frontends {
		compileFrontend(p, &p.port.Frontends[i], comment, emit)
	}
	for i := range p.sets {
		set := &p.sets[i]
		for slot := range set.Len() {
			compileSlot(p, i, slot, emit)
		}
		for _, e := range set.Endpoints {
			if e.MayHairpin {
				addr := string(e.Addr().AsSlice())
				emit(nft.Element{Set: hairpin, Key: addr + addr})
			}
		}
	}
}

// frontendSets are the sets in which a frontend has elements. The keys of NodePorts
// lack the address, so NodePorts have sets of their own.
type frontendSets struct{ external, internal, masquerade nft.SetID }

func setsOf(fe *plan.Frontend) frontendSets {
	if fe.Addr.IsValid() {
		return frontendSets{frontends, internalFrontends, masquerade}
	}
	return frontendSets{nodePorts, internalNodePorts, nodePortMasquerade}
}

func compileFrontend(p *programmedPort, fe *plan.Frontend, comment string, emit func(nft.Element)) {
	sets, key := setsOf(fe), access.FrontendBytes(fe.Key(p.port.Name.Protocol))
	external, internal := p.idOf(fe.External), p.idOf(fe.Internal)
	emit(nft.Element{Set: sets.external, Key: key, Data: nft.MarkData(external), Comment: comment})
	if internal != external {
		emit(nft.Element{Set: sets.internal, Key: key, Data: nft.MarkData(internal), Comment: comment})
	}
	emit(nft.Element{Set: sets.masquerade, Key: key, Data: nft.MarkData(uint32(fe.Masquerade))})
	if external == noSet || internal == noSet {
		emit(access.RejectElement(fe, p.port.Name.Protocol, fe.WhenEmpty == plan.Drop, comment))
	}
	access.SourceElements(fe, p.port.Name.Protocol, emit)
	if fe.Kind == plan.ClusterIP && fe.Addr.IsValid() {
		emit(nft.Element{Set: clusterIPs, Key: string(fe.Addr.AsSlice())})
	}
}

// compileSlot emits the endpoint in one slot of set number i.
func compileSlot(p *programmedPort, i, slot int, emit func(nft.Element)) {
	set := &p.sets[i]
	index := set.endpoint(slot)
	e := set.Endpoints[index]
	addr := string(nft.AppendPort(nft.AppendAddr(nil, e.Addr()), e.Port()))
	if !p.sticky() {
		emit(nft.Element{Set: endpoints, Key: slotKey(set.firstID, slot), Data: addr})
		return
	}
	id := p.idRange | endpointFlag(p.large()) | set.numbers[index]
	emit(nft.Element{Set: affinitySlots, Key: slotKey(p.idRange|uint32(i), slot), Data: nft.MarkData(id)})
	emit(nft.Element{Set: affinityEndpoints + nft.SetID(i), Key: nft.MarkKey(id), Data: addr})
}

func slotKey(id uint32, slot int) string {
	return string(nft.AppendID(nft.AppendID(make([]byte, 0, 8), id), uint32(slot)))
}
