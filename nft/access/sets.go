// SPDX-License-Identifier: Apache-2.0

package access

import "signalbox/nft"

// The sets with which the table of every mode begins, by their place.
const (
	restricted nft.SetID = iota
	AllowedSources
	restrictedNodePorts
	allowedNodePortSources
	Rejected
	Dropped
	RejectedNodePorts
	DroppedNodePorts
	localPods
	ownPods
	nodePortAddrs
	ServiceCIDRs
	// FirstOwn is the place of a mode's first own set.
	FirstOwn
)

// FrontendKey are the fields of sets by frontend, NodePortKey those of sets by node port.
var (
	FrontendKey = []nft.Field{nft.AddrField, nft.ProtoField, nft.PortField}
	NodePortKey = []nft.Field{nft.ProtoField, nft.PortField}
)

// Sets declares the sets with which a table begins. A mode appends its own.
func Sets() []*nft.Set {
	addr := []nft.Field{nft.AddrField}
	return []*nft.Set{
		restricted:             {Name: "restricted", Key: FrontendKey, Comment: "frontends that only allowed sources may use"},
		AllowedSources:         {Name: "allowed-sources", Key: append(FrontendKey[:3:3], nft.AddrField), Interval: true},
		restrictedNodePorts:    {Name: "restricted-nodeports", Key: NodePortKey},
		allowedNodePortSources: {Name: "allowed-nodeport-sources", Key: append(NodePortKey[:2:2], nft.AddrField), Interval: true},
		Rejected:               {Name: "rejected", Key: FrontendKey, Comment: "frontends without endpoints"},
		Dropped:                {Name: "dropped", Key: FrontendKey, Comment: "frontends without endpoints that may be used here"},
		RejectedNodePorts:      {Name: "rejected-nodeports", Key: NodePortKey},
		DroppedNodePorts:       {Name: "dropped-nodeports", Key: NodePortKey},
		localPods:              {Name: "local-pods", Key: addr, Interval: true},
		ownPods:                {Name: "own-pods", Key: addr, Interval: true, Comment: "of these, the ones on this node"},
		nodePortAddrs:          {Name: "nodeport-addrs", Key: addr},
		ServiceCIDRs:           {Name: "service-cidrs", Key: addr, Interval: true},
	}
}

var names = func() (list [FirstOwn]string) {
	for i, s := range Sets() {
		list[i] = s.Name
	}
	return list
}()

func in(v nft.Value, set nft.SetID) nft.Statement    { return nft.In(v, names[set]) }
func notIn(v nft.Value, set nft.SetID) nft.Statement { return nft.NotIn(v, names[set]) }
