package ipvs

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"signalbox/proxier/plan"
)

// CleanupKubeProxy removes what kube-proxy's ipvs mode leaves beside its
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
func CleanupKubeProxy(f plan.Family, sharesDevice, drain bool) (removed bool, draining int, err error) {
	d, err := openDevice(f)
	if err != nil {
		return false, 0, err
	}
	defer d.close()
	if err := d.find(); err != nil {
		return false, 0, err
	}
	c := cleanup{device: d, sharesDevice: sharesDevice, drain: drain}
	if c.sets, err = readSets(f); err != nil {
		return false, 0, err
	}
	if d.link != nil {
		if c.held, _, err = d.held(); err != nil {
			return false, 0, err
		}
	}
	if len(c.sets) == 0 && (d.link == nil || sharesDevice) {
		return false, 0, nil
	}
	draining, err = c.kubeProxy(f)
	return c.removed, draining, err
}

// cleanup is one removal of virtual servers, kube-proxy's or this mode's.
type cleanup struct {
	device              *device
	held                map[netip.Addr]bool // addresses of the device
	sets                []kubeProxySet
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
			c.note(c.sets[i].destroy())
		}
	}
	return draining, errors.Join(c.failed...)
}

// removeServers removes the virtual servers that are to go, with their
// addresses, and returns how many have connections yet.
func (c *cleanup) removeServers(f plan.Family, goes func(serverKey) bool) (draining int) {
	var gone, busy []serverKey
	k, err := openKernel(f)
	if err == nil { // without IPVS there are no virtual servers
		defer k.close()
		gone, busy = c.choose(k, goes)
	}
	if !c.sharesDevice && !c.keepAddrs {
		c.removeAddrs(busy)
	}
	if len(gone) > 0 {
		ops := make([]op, len(gone))
		for i, key := range gone {
			ops[i] = op{verb: removeServer, key: key}
		}
		c.fail(k.send(ops, func(op) { c.removed = true }))
	}
	return len(busy)
}

// choose lists the virtual servers that are to go now, and those that have
// connections yet.
func (c *cleanup) choose(k kernel, goes func(serverKey) bool) (gone, busy []serverKey) {
	all, err := k.servers()
	c.fail(err)
	for key := range all {
		if !goes(key) {
			c.keepAddrs = c.keepAddrs || isOurs(key.mark)
			continue
		}
		used := false
		if c.drain {
			used, err = quiet(k, key)
			c.fail(err)
		}
		if used {
			busy = append(busy, key)
			c.keepAddrs = c.keepAddrs || isOurs(key.mark)
		} else {
			gone = append(gone, key)
		}
	}
	return gone, busy
}

// theirs says whether a virtual server is kube-proxy's.
func (c *cleanup) theirs(key serverKey) bool {
	switch {
	case key.mark != 0:
		return false
	case c.held[key.addr]:
		return !c.sharesDevice
	}
	return slices.ContainsFunc(c.sets, func(s kubeProxySet) bool {
		return s.names(key) && (s.ports == nil || c.device.isLocal(key.addr))
	})
}

// removeAddrs takes the addresses from the device, but for those of servers
// that are busy, and the device with the last. It comes before the removal of
// servers: then no packet comes for what goes.
func (c *cleanup) removeAddrs(busy []serverKey) {
	stays := make(map[netip.Addr]bool)
	for _, key := range busy {
		stays[key.addr] = true
	}
	var gone []netip.Addr
	for a := range c.held {
		if !stays[a] {
			gone = append(gone, a)
		}
	}
	c.fail(c.device.remove(gone, func(netip.Addr) { c.removed = true }))
	if c.device.link != nil {
		device, err := c.device.removeUnused()
		c.removed = c.removed || device
		c.fail(err)
	}
}

// quiet lets a server have no new connections, and says whether it has any.
func quiet(k kernel, key serverKey) (busy bool, err error) {
	dests, err := k.dests(key)
	if err != nil {
		return false, err
	}
	var failed []error
	for _, d := range dests {
		busy = busy || d.connections > 0
		if d.weight != 0 {
			failed = append(failed, do(k, op{verb: setDest, key: key, dest: d.addr}))
		}
	}
	if err := errors.Join(failed...); err != nil {
		return busy, fmt.Errorf("drain %s: %w", key, err)
	}
	return busy, nil
}

// HasKubeProxy says whether there are sets of kube-proxy's ipvs mode: it makes
// them whenever it writes anything.
func HasKubeProxy(f plan.Family) bool {
	_, err := listSet(setName("KUBE-CLUSTER-IP", f))
	return err == nil
}
