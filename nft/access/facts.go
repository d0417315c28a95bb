// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// SourceElements hands out the source ranges of a frontend for CheckSources. A frontend
// for everybody has none.
func SourceElements(fe *plan.Frontend, p plan.Protocol, emit func(nft.Element)) {
	if fe.Sources == nil {
		return
	}
	set, allowed := restricted, AllowedSources
	if !fe.Addr.IsValid() {
		set, allowed = restrictedNodePorts, allowedNodePortSources
	}
	key := FrontendBytes(fe.Key(p))
	emit(nft.Element{Set: set, Key: key})
	emitRanges(allowed, key, fe.Sources, emit)
}

// RejectElement is the element of a frontend without endpoints for RejectFrontends and
// RejectNodePorts.
func RejectElement(fe *plan.Frontend, p plan.Protocol, drop bool, comment string) nft.Element {
	e := nft.Element{Set: Rejected, Key: FrontendBytes(fe.Key(p)), Comment: comment}
	if !fe.Addr.IsValid() {
		e.Set = RejectedNodePorts
	}
	if drop {
		e.Set++
	}
	return e
}

// NodeElements are the elements that follow from the node's facts.
func (r Rules) NodeElements() (list []nft.Element) {
	emit := func(e nft.Element) { list = append(list, e) }
	emitRanges(localPods, "", r.Node.LocalPods.Prefixes, emit)
	emitRanges(ownPods, "", r.Node.OwnPods, emit)
	emitRanges(ServiceCIDRs, "", r.Node.ServiceCIDRs, emit)
	if !r.Node.NodePortAddrs.All {
		for _, a := range r.nodePortAddrs() {
			emit(nft.Element{Set: nodePortAddrs, Key: string(a.AsSlice())})
		}
	}
	return list
}

// RewriteNodeElements replaces them.
func (r Rules) RewriteNodeElements(t *nft.Table) {
	for set := localPods; set < FirstOwn; set++ {
		t.FlushSet(set)
	}
	t.AddElements(r.NodeElements())
}

func emitRanges(set nft.SetID, key string, prefixes []netip.Prefix, emit func(nft.Element)) {
	for _, p := range nft.Disjoint(prefixes) {
		emit(nft.Element{Set: set, Key: key + string(p.Addr().AsSlice()), End: key + string(nft.LastAddr(p).AsSlice())})
	}
}
