package ipvs

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"signalbox/ipvs/internal/kernel"

	"signalbox/proxier/plan"
)

// cleanupKubeProxy removes what kube-proxy's ipvs mode leaves beside its
// iptables rules, which must be gone before: its virtual servers, the device
// with their addresses, and its sets. Its virtual servers are those at
// addresses of the device, and those that its sets name; others, as of a
// keepalived, stay as they are.
//
// sharesDevice says that this mode serves the family: it has taken over the
// device and what is at its addresses, and only the rest goes.
//
// With drain, a virtual server that has connections gets no new ones and stays,
// with its address, and the function is to be called again later; draining is
// how many do. IPVS would end connections with their server.
//
// removed says whether anything was there that went.
func cleanupKubeProxy(f plan.Family, sharesDevice, drain bool) (removed bool, draining int, err error) {
	d, err := kernel.OpenDevice(f)
	if err != nil {
		return false, 0, err
	}
	defer d.Close()
	if err := d.Find(); err != nil {
		return false, 0, err
	}
	c := cleanup{device: d, sharesDevice: sharesDevice, drain: drain}
	if c.sets, err = kernel.ReadKubeProxySets(f); err != nil {
		return false, 0, err
	}
	if d.Exists() {
		if c.held, _, err = d.Addresses(); err != nil {
			return false, 0, err
		}
	}
	if len(c.sets) == 0 && (!d.Exists() || sharesDevice) {
		return false, 0, nil
	}
	draining, err = c.kubeProxy(f)
	return c.removed, draining, err
}

// cleanup is one removal of virtual servers, kube-proxy's or this mode's.
type cleanup struct {
	device              *kernel.Device
	held                map[netip.Addr]bool // addresses of the device
	sets                []kernel.KubeProxySet
	sharesDevice, drain bool
	// keepAddrs is that a virtual server by a mark of this mode stays. Which
	// addresses lead to it nothing tells any more.
	keepAddrs bool
	removed   bool // something
	failed    []error
}

func (c *cleanup) fail(err error) {
	if err != nil {
		c.failed = append(c.failed, err)
	}
}

// note takes in how the removal of something that was there ended.
func (c *cleanup) note(err error) {
	c.removed = c.removed || err == nil
	c.fail(err)
}

func (c *cleanup) kubeProxy(f plan.Family) (draining int, err error) {
	draining = c.removeServers(f, c.theirs)
	// The sets tell which servers at the node's own addresses are kube-proxy's:
	// they go with the last.
	if draining == 0 {
		for i := range c.sets {
			c.note(c.sets[i].Destroy())
		}
	}
	return draining, errors.Join(c.failed...)
}

// removeServers removes the virtual servers that are to go, with their
// addresses, and returns how many have connections yet.
func (c *cleanup) removeServers(f plan.Family, goes func(kernel.ServerKey) bool) (draining int) {
	var gone, busy []kernel.ServerKey
	k, err := kernel.OpenIPVS(f)
	if err == nil { // without IPVS there are no virtual servers
		defer k.Close()
		gone, busy = c.choose(k, goes)
	}
	if !c.sharesDevice && !c.keepAddrs {
		c.removeAddrs(busy)
	}
	if len(gone) > 0 {
		ops := make([]kernel.Op, len(gone))
		for i, key := range gone {
			ops[i] = kernel.Op{Verb: kernel.RemoveServer, Key: key}
		}
		c.fail(k.Send(ops, func(kernel.Op) { c.removed = true }))
	}
	return len(busy)
}

// choose lists the virtual servers that are to go now, and those that have
// connections yet.
func (c *cleanup) choose(k ipvsClient, goes func(kernel.ServerKey) bool) (gone, busy []kernel.ServerKey) {
	all, err := k.Servers()
	c.fail(err)
	for key := range all {
		if !goes(key) {
			c.keepAddrs = c.keepAddrs || isOurs(key.Mark)
			continue
		}
		used := false
		if c.drain {
			used, err = quiet(k, key)
			c.fail(err)
		}
		if used {
			busy = append(busy, key)
			c.keepAddrs = c.keepAddrs || isOurs(key.Mark)
		} else {
			gone = append(gone, key)
		}
	}
	return gone, busy
}

// theirs says whether a virtual server is kube-proxy's.
func (c *cleanup) theirs(key kernel.ServerKey) bool {
	switch {
	case key.Mark != 0:
		return false
	case c.held[key.Addr]:
		return !c.sharesDevice
	}
	return slices.ContainsFunc(c.sets, func(s kernel.KubeProxySet) bool {
		return s.Names(key, c.device.IsLocal)
	})
}

// removeAddrs takes the addresses from the device, but for those of servers
// that are busy, and the device with the last. It comes before the removal of
// servers: then no packet comes for what goes.
func (c *cleanup) removeAddrs(busy []kernel.ServerKey) {
	stays := make(map[netip.Addr]bool)
	for _, key := range busy {
		stays[key.Addr] = true
	}
	var gone []netip.Addr
	for a := range c.held {
		if !stays[a] {
			gone = append(gone, a)
		}
	}
	c.fail(c.device.Remove(gone, func(netip.Addr) { c.removed = true }))
	if c.device.Exists() {
		device, err := c.device.RemoveUnused()
		c.removed = c.removed || device
		c.fail(err)
	}
}

// quiet lets a server have no new connections, and says whether it has any.
func quiet(k ipvsClient, key kernel.ServerKey) (busy bool, err error) {
	dests, err := k.Destinations(key)
	if err != nil {
		return false, err
	}
	var ops []kernel.Op
	for _, d := range dests {
		busy = busy || d.Connections > 0
		if d.Weight != 0 {
			ops = append(ops, kernel.Op{Verb: kernel.SetDestination, Key: key, Destination: d.Addr})
		}
	}
	if err := k.Send(ops, func(kernel.Op) {}); err != nil {
		return busy, fmt.Errorf("drain %s: %w", key, err)
	}
	return busy, nil
}
