package conntrack

import (
	"net/netip"
	"time"

	"signalbox/proxier/plan"
)

// flow is an entry of the connection tracking table.
type flow struct {
	// to is the original destination, from the source of replies. They differ
	// if the destination was translated.
	to, from netip.AddrPort
	answered bool   // the kernel has seen a reply
	handle   []byte // attributes by which the kernel finds the entry
}

func (f *flow) translated() bool { return f.from != f.to }

// task is to remove the flows to one frontend that no usable endpoint answers.
type task struct {
	usable *plan.EndpointSet
	// recheck is when the second and last scan is due; zero before the first.
	recheck time.Time
}

// tasks are those of one family.
type tasks map[plan.FrontendKey]task

// stale reports whether a flow must be removed. local recognises the addresses of
// this node, and relay those of a relay on it.
func (t tasks) stale(f *flow, local, relay func(netip.Addr) bool) bool {
	key := plan.FrontendKey{Addr: f.to.Addr(), Port: f.to.Port(), Protocol: plan.UDP}
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

// keeps reports whether a usable endpoint or a relay answers the flow.
func (t task) keeps(f *flow, relay func(netip.Addr) bool) bool {
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
