// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"signalbox/ipvs/internal/kernel"
	"signalbox/proxier/plan"
)

// findDevice opens the device of a family, which need not exist, without making it.
func findDevice(f plan.Family) (*kernel.Device, error) {
	d, err := kernel.OpenDevice(f)
	if err != nil {
		return nil, err
	}
	if err := d.Find(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// cleanupKubeProxy removes what kube-proxy's ipvs mode leaves besides its iptables rules: its
// virtual servers, the device with their addresses, and its ipsets. The iptables rules must
// be gone already, because they use the ipsets. Servers of kube-proxy are those at addresses
// of the device, and those that its ipsets name. Servers of other software stay.
//
// If this mode serves the family (sharesDevice), the device and the servers at its addresses
// stay.
//
// With drain, a virtual server with connections stays with its address, and gets no new
// connections. draining is the number of these servers; the caller calls again later.
func cleanupKubeProxy(f plan.Family, sharesDevice, drain bool) (removed bool, draining int, err error) {
	d, err := findDevice(f)
	if err != nil {
		return false, 0, err
	}
	defer d.Close()
	c := cleanup{device: d, sharesDevice: sharesDevice, drain: drain}
	if c.sets, err = kernel.ReadKubeProxySets(f); err != nil {
		return false, 0, err
	}
	if d.Exists() {
		if c.onDevice, _, err = d.Addresses(); err != nil {
			return false, 0, err
		}
	}
	if len(c.sets) == 0 && (!d.Exists() || sharesDevice) {
		return false, 0, nil
	}
	draining = c.removeServers(f, c.belongsToKubeProxy)
	// The ipsets show which servers at the node's own addresses are kube-proxy's. So they
	// go with the last server.
	if draining == 0 {
		for i := range c.sets {
			err := c.sets[i].Destroy()
			c.removed = c.removed || err == nil
			c.fail(err)
		}
	}
	return c.removed, draining, errors.Join(c.failed...)
}

// cleanup removes virtual servers of kube-proxy or of this mode.
type cleanup struct {
	device              *kernel.Device
	onDevice            map[netip.Addr]bool
	sets                []kernel.KubeProxySet
	sharesDevice, drain bool
	// keepAddrs: a virtual server by a mark of this mode stays, and it is unknown which
	// addresses lead to it.
	keepAddrs bool
	removed   bool // something
	failed    []error
}

func (c *cleanup) fail(err error) {
	if err != nil {
		c.failed = append(c.failed, err)
	}
}

// removeServers removes virtual servers and their addresses. It returns how many servers
// stay because they have connections.
func (c *cleanup) removeServers(f plan.Family, remove func(kernel.ServerKey) bool) (draining int) {
	var idle, busy []kernel.ServerKey
	k, err := kernel.OpenIPVS(f)
	if err == nil { // without IPVS there are no virtual servers
		defer k.Close()
		idle, busy = c.classify(k, remove)
	}
	if !c.sharesDevice && !c.keepAddrs {
		c.removeAddrs(busy)
	}
	if len(idle) > 0 {
		ops := make([]kernel.Op, len(idle))
		for i, key := range idle {
			ops[i] = kernel.Op{Verb: kernel.RemoveServer, Key: key}
		}
		c.fail(k.Send(ops, func(kernel.Op) { c.removed = true }))
	}
	return len(busy)
}

// classify lists the virtual servers to remove now, and those with connections.
func (c *cleanup) classify(k ipvsClient, remove func(kernel.ServerKey) bool) (idle, busy []kernel.ServerKey) {
	all, err := k.Servers()
	c.fail(err)
	for key := range all {
		stays := !remove(key)
		if !stays && c.drain {
			stays, err = quiesce(k, key)
			c.fail(err)
			if stays {
				busy = append(busy, key)
			}
		}
		if !stays {
			idle = append(idle, key)
		}
		c.keepAddrs = c.keepAddrs || stays && isOurs(key.Mark)
	}
	return idle, busy
}

// belongsToKubeProxy says whether a virtual server is kube-proxy's.
func (c *cleanup) belongsToKubeProxy(key kernel.ServerKey) bool {
	switch {
	case key.Mark != 0:
		return false
	case c.onDevice[key.Addr]:
		return !c.sharesDevice
	}
	return slices.ContainsFunc(c.sets, func(s kernel.KubeProxySet) bool { return s.Names(key, c.device.IsLocal) })
}

// removeAddrs removes the addresses that no busy server has, and then an unused device. It
// runs before virtual servers are removed, so that no packet comes for a removed server.
func (c *cleanup) removeAddrs(busy []kernel.ServerKey) {
	stays := make(map[netip.Addr]bool)
	for _, key := range busy {
		stays[key.Addr] = true
	}
	var unused []netip.Addr
	for a := range c.onDevice {
		if !stays[a] {
			unused = append(unused, a)
		}
	}
	c.fail(c.device.Remove(unused, func(netip.Addr) { c.removed = true }))
	if c.device.Exists() {
		device, err := c.device.RemoveUnused()
		c.removed = c.removed || device
		c.fail(err)
	}
}

// quiesce stops new connections to a virtual server, and says whether it has connections.
func quiesce(k ipvsClient, key kernel.ServerKey) (busy bool, err error) {
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
