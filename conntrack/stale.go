// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"net/netip"
	"slices"
	"time"

	"signalbox/proxier/plan"
)

// flow is an entry of the connection tracking table.
type flow struct {
	// to is the original destination, from the source of replies. They differ
	// if the destination was translated.
	to, from netip.AddrPort
	// client is the original source, and source the destination of replies. They
	// differ if the source was translated.
	client, source netip.AddrPort
	protocol       plan.Protocol
	answered       bool   // the kernel has seen a reply
	assured        bool   // packets go both ways, so that the kernel keeps the entry in a full table
	state          uint8  // of TCP or SCTP; 0 if the message has none
	id             uint32 // distinguishes it from a later one between the same ports
	handle         []byte // attributes by which the kernel finds the entry
}

func (f *flow) translated() bool { return f.from != f.to }

// task is to remove the flows to one frontend that no usable endpoint answers, and of
// TCP only those that removed endpoints answer.
type task struct {
	usable  *plan.EndpointSet
	removed []netip.AddrPort
	// recheck is when the second and last scan is due; zero before the first.
	recheck time.Time
}

// tasks are those of one family.
type tasks map[plan.FrontendKey]task

// put replaces a task. Endpoints that were removed before still are, unless they are
// usable again.
func (t tasks) put(key plan.FrontendKey, next task) {
	next.removed = append(slices.Clone(t[key].removed), next.removed...)
	slices.SortFunc(next.removed, netip.AddrPort.Compare)
	next.removed = slices.Compact(next.removed)
	t[key] = next
}

// protocols lists those of the frontends.
func (t tasks) protocols() (list []plan.Protocol) {
	for key := range t {
		if !slices.Contains(list, key.Protocol) {
			list = append(list, key.Protocol)
		}
	}
	return list
}

// stale reports whether a flow must be removed. local recognises the addresses of
// this node, and relay those of a relay on it.
func (t tasks) stale(f *flow, local, relay func(netip.Addr) bool) bool {
	key := plan.FrontendKey{Addr: f.to.Addr(), Port: f.to.Port(), Protocol: f.protocol}
	if task, ok := t[key]; ok {
		return !task.keeps(f, relay)
	}
	key.Addr = netip.Addr{}
	task, ok := t[key]
	if !ok || !f.translated() && f.answered || !local(f.to.Addr()) {
		return false
	}
	return !task.keeps(f, relay)
}

// keeps reports whether a usable endpoint or a relay answers the flow, or a TCP
// connection's endpoint was not removed.
func (t task) keeps(f *flow, relay func(netip.Addr) bool) bool {
	if f.protocol == plan.TCP {
		_, removed := slices.BinarySearchFunc(t.removed, f.from, netip.AddrPort.Compare)
		return !removed || t.usable.Contains(f.from)
	}
	return t.usable.Contains(f.from) || t.usable.Len() > 0 && relay(f.from.Addr())
}

// haveNodePorts reports whether any of the frontends is a NodePort.
func (t tasks) haveNodePorts() bool {
	for key := range t {
		if !key.Addr.IsValid() {
			return true
		}
	}
	return false
}
