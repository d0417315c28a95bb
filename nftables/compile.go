package nftables

import (
	"net/netip"

	"signalbox/proxier/plan"
)

// compile hands every element that the record stands for to emit. Elements of
// shared sets may come more than once.
func (f *family) compile(r *record, emit func(element)) {
	comment := commentText(r.port.Name.String())
	for i := range r.port.Frontends {
		f.compileFrontend(r, &r.port.Frontends[i], comment, emit)
	}
	for i := range r.sets {
		set := &r.sets[i]
		for slot := range set.Len() {
			f.compileSlot(r, i, slot, emit)
		}
		for _, e := range set.Endpoints {
			if e.MayHairpin {
				addr := string(e.Addr().AsSlice())
				emit(element{set: hairpin, key: addr + addr})
			}
		}
	}
}

// frontendSets are the sets in which a frontend has elements; NodePorts have
// their own, whose keys lack the address.
type frontendSets struct {
	external, internal, masquerade, refused, dropped, restricted, allowed setID
}

var (
	addressedSets = frontendSets{frontends, internalFrontends, masquerade, refused, dropped, restricted, allowedSources}
	nodePortSets  = frontendSets{nodePorts, internalNodePorts, nodePortMasquerade, refusedNodePorts, droppedNodePorts, restrictedNodePorts, allowedNodePortSources}
)

func (f *family) compileFrontend(r *record, fe *plan.Frontend, comment string, emit func(element)) {
	sets := addressedSets
	if !fe.Addr.IsValid() {
		sets = nodePortSets
	}
	key := frontendBytes(fe.Key(r.port.Name.Protocol))
	external, internal := r.idOf(fe.External), r.idOf(fe.Internal)
	emit(element{set: sets.external, key: key, data: idDatumBytes(external), comment: comment})
	if internal != external {
		emit(element{set: sets.internal, key: key, data: idDatumBytes(internal), comment: comment})
	}
	emit(element{set: sets.masquerade, key: key, data: idDatumBytes(uint32(fe.Masquerade))})
	if external == noSet || internal == noSet {
		emit(element{set: sets.refused, key: key, comment: comment})
		if fe.WhenEmpty == plan.Drop {
			emit(element{set: sets.dropped, key: key})
		}
	}
	if fe.Sources != nil {
		emit(element{set: sets.restricted, key: key})
		for _, p := range disjoint(fe.Sources) {
			emit(element{set: sets.allowed,
				key: key + string(p.Addr().AsSlice()), end: key + string(lastAddr(p).AsSlice())})
		}
	}
	if fe.Kind == plan.ClusterIP && fe.Addr.IsValid() {
		emit(element{set: clusterIPs, key: string(fe.Addr.AsSlice())})
	}
}

// compileSlot emits what stands for one endpoint in one slot of set number i.
func (f *family) compileSlot(r *record, i, slot int, emit func(element)) {
	set := &r.sets[i]
	index := set.endpoint(slot)
	e := set.Endpoints[index]
	addr := string(appendPort(appendAddr(nil, e.Addr()), e.Port()))
	if !r.sticky() {
		emit(element{set: endpoints, key: slotKey(set.base, slot), data: addr})
		return
	}
	id := r.block | endpointFlag(r.large()) | set.numbers[index]
	emit(element{set: affinitySlots, key: slotKey(r.block|uint32(i), slot), data: idDatumBytes(id)})
	emit(element{set: affinityEndpoints + setID(i), key: idKey(id), data: addr})
}

func slotKey(id uint32, slot int) string {
	return string(appendID(appendID(make([]byte, 0, 8), id), uint32(slot)))
}

// compileNode hands out the elements that the node's facts make.
func (r ruleset) compileNode(emit func(element)) {
	intervals := func(set setID, prefixes []netip.Prefix) {
		for _, p := range disjoint(prefixes) {
			emit(element{set: set, key: string(p.Addr().AsSlice()), end: string(lastAddr(p).AsSlice())})
		}
	}
	intervals(localPods, r.node.LocalPods.Prefixes)
	intervals(ownPods, r.node.OwnPods)
	intervals(serviceCIDRs, r.node.ServiceCIDRs)
	for _, a := range r.nodePortAddrs() {
		emit(element{set: nodePortAddrs, key: string(a.AsSlice())})
	}
}

// nodePortAddrs leaves loopback addresses out: the kernel does not route what
// comes from there to a Pod.
func (r ruleset) nodePortAddrs() []netip.Addr {
	var addrs []netip.Addr
	for _, a := range r.node.NodePortAddrs.Addrs {
		if !a.IsLoopback() {
			addrs = append(addrs, a)
		}
	}
	return addrs
}
