package nftables

import (
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// compile hands every element that the record stands for to emit. Elements of
// shared sets may come more than once.
func compile(r *programmedPort, emit func(nft.Element)) {
	comment := nft.CommentText(r.port.Name.String())
	for i := range r.port.Frontends {
		compileFrontend(r, &r.port.Frontends[i], comment, emit)
	}
	for i := range r.sets {
		set := &r.sets[i]
		for slot := range set.Len() {
			compileSlot(r, i, slot, emit)
		}
		for _, e := range set.Endpoints {
			if e.MayHairpin {
				addr := string(e.Addr().AsSlice())
				emit(nft.Element{Set: hairpin, Key: addr + addr})
			}
		}
	}
}

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct {
	external, internal, masquerade, refused, dropped nft.SetID
}

var (
	addressedSets = frontendSets{frontends, internalFrontends, masquerade, refused, dropped}
	nodePortSets  = frontendSets{nodePorts, internalNodePorts, nodePortMasquerade, refusedNodePorts, droppedNodePorts}
)

func compileFrontend(r *programmedPort, fe *plan.Frontend, comment string, emit func(nft.Element)) {
	sets := addressedSets
	if !fe.Addr.IsValid() {
		sets = nodePortSets
	}
	key := access.FrontendBytes(fe.Key(r.port.Name.Protocol))
	external, internal := r.idOf(fe.External), r.idOf(fe.Internal)
	emit(nft.Element{Set: sets.external, Key: key, Data: nft.MarkData(external), Comment: comment})
	if internal != external {
		emit(nft.Element{Set: sets.internal, Key: key, Data: nft.MarkData(internal), Comment: comment})
	}
	emit(nft.Element{Set: sets.masquerade, Key: key, Data: nft.MarkData(uint32(fe.Masquerade))})
	if external == noSet || internal == noSet {
		emit(nft.Element{Set: sets.refused, Key: key, Comment: comment})
		if fe.WhenEmpty == plan.Drop {
			emit(nft.Element{Set: sets.dropped, Key: key})
		}
	}
	access.SourceElements(fe, r.port.Name.Protocol, emit)
	if fe.Kind == plan.ClusterIP && fe.Addr.IsValid() {
		emit(nft.Element{Set: clusterIPs, Key: string(fe.Addr.AsSlice())})
	}
}

// compileSlot emits what stands for one endpoint in one slot of set number i.
func compileSlot(r *programmedPort, i, slot int, emit func(nft.Element)) {
	set := &r.sets[i]
	index := set.endpoint(slot)
	e := set.Endpoints[index]
	addr := string(nft.AppendPort(nft.AppendAddr(nil, e.Addr()), e.Port()))
	if !r.sticky() {
		emit(nft.Element{Set: endpoints, Key: slotKey(set.firstID, slot), Data: addr})
		return
	}
	id := r.idRange | endpointFlag(r.large()) | set.numbers[index]
	emit(nft.Element{Set: affinitySlots, Key: slotKey(r.idRange|uint32(i), slot), Data: nft.MarkData(id)})
	emit(nft.Element{Set: affinityEndpoints + nft.SetID(i), Key: nft.MarkKey(id), Data: addr})
}

func slotKey(id uint32, slot int) string {
	return string(nft.AppendID(nft.AppendID(make([]byte, 0, 8), id), uint32(slot)))
}
