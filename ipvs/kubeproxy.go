package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

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

// kubeProxySets are the sets of kube-proxy's ipvs mode, by their names for
// IPv4. The value is the protocol of a set of NodePorts that holds nothing but
// ports, else 0.
var kubeProxySets = map[string]plan.Protocol{
	"KUBE-LOOP-BACK": 0, "KUBE-CLUSTER-IP": 0, "KUBE-EXTERNAL-IP": 0, "KUBE-EXTERNAL-IP-LOCAL": 0,
	"KUBE-LOAD-BALANCER": 0, "KUBE-LOAD-BALANCER-LOCAL": 0, "KUBE-LOAD-BALANCER-FW": 0,
	"KUBE-LOAD-BALANCER-SOURCE-IP": 0, "KUBE-LOAD-BALANCER-SOURCE-CIDR": 0,
	"KUBE-NODE-PORT-TCP": plan.TCP, "KUBE-NODE-PORT-LOCAL-TCP": plan.TCP,
	"KUBE-NODE-PORT-UDP": plan.UDP, "KUBE-NODE-PORT-LOCAL-UDP": plan.UDP,
	"KUBE-NODE-PORT-SCTP-HASH": 0, "KUBE-NODE-PORT-LOCAL-SCTP-HASH": 0,
	"KUBE-HEALTH-CHECK-NODE-PORT": 0, "KUBE-IPVS-IPS": 0,
}

// longestSetName is what the kernel keeps of a set's name (IPSET_MAXNAMELEN
// with the byte that ends it): kube-proxy cuts what is longer.
const longestSetName = 31

// setName is kube-proxy's name for a set of a family.
func setName(name string, f plan.Family) string {
	if f == plan.IPv6 {
		name = "KUBE-6-" + strings.TrimPrefix(name, "KUBE-")
	}
	return name[:min(len(name), longestSetName)]
}

// kubeProxySet is what one of the sets tells of virtual servers.
type kubeProxySet struct {
	name     string
	protocol plan.Protocol // of ports
	// ports are NodePorts, and servers those at the addresses it names; one of
	// the two is nil.
	ports   map[uint16]bool
	servers map[serverKey]bool
}

// names says whether the set names a virtual server, at whatever address for a
// set of NodePorts.
func (s *kubeProxySet) names(key serverKey) bool {
	if s.ports != nil {
		return s.protocol == key.protocol && s.ports[key.port]
	}
	return s.servers[key]
}

// readSets reads those of kube-proxy's sets that there are.
func readSets(f plan.Family) ([]kubeProxySet, error) {
	var sets []kubeProxySet
	for name, protocol := range kubeProxySets {
		name = setName(name, f)
		result, err := listSet(name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no ipset
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list the set %s: %w", name, err)
		}
		set, err := parseSet(name, protocol, result)
		if err != nil {
			return nil, fmt.Errorf("read the set %s: %w", name, err)
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// listSet returns the kernel's messages about a set. The library would read them,
// but logs two lines for each set of a kernel since 5.11, which tells more of it
// than the library knows.
func listSet(name string) ([][]byte, error) {
	req := nl.NewNetlinkRequest(nl.IPSET_CMD_LIST|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(nl.IPSET_CMD_LIST))
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_NETLINK, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)))
	return req.Execute(unix.NETLINK_NETFILTER, 0)
}

func parseSet(name string, protocol plan.Protocol, messages [][]byte) (kubeProxySet, error) {
	s := kubeProxySet{name: name, protocol: protocol}
	if protocol != 0 {
		s.ports = make(map[uint16]bool)
	} else {
		s.servers = make(map[serverKey]bool)
	}
	for _, m := range messages {
		if len(m) < nl.SizeofNfgenmsg {
			return s, errors.New("the kernel's answer is too short")
		}
		for _, list := range attributeValues(m[nl.SizeofNfgenmsg:], nl.IPSET_ATTR_ADT) {
			for _, data := range attributeValues(list, nl.IPSET_ATTR_DATA) {
				s.add(data)
			}
		}
	}
	return s, nil
}

// add takes an entry, if it is of a port.
func (s *kubeProxySet) add(entry []byte) {
	ports, endpoints := attributeValues(entry, nl.IPSET_ATTR_PORT), attributeValues(entry, nl.IPSET_ATTR_IP2)
	if len(ports) == 0 || len(ports[0]) != 2 || len(endpoints) > 0 {
		return
	}
	key := serverKey{port: binary.BigEndian.Uint16(ports[0])}
	if s.ports != nil {
		s.ports[key.port] = true
		return
	}
	for _, p := range attributeValues(entry, nl.IPSET_ATTR_PROTO) {
		key.protocol = plan.Protocol(p[0])
	}
	for _, ip := range attributeValues(entry, nl.IPSET_ATTR_IP) {
		for _, raw := range slices.Concat(attributeValues(ip, nl.IPSET_ATTR_IPADDR_IPV4), attributeValues(ip, nl.IPSET_ATTR_IPADDR_IPV6)) {
			key.addr, _ = netip.AddrFromSlice(raw)
		}
	}
	if key.protocol != 0 && key.addr.IsValid() {
		s.servers[key] = true
	}
}

// attributeValues returns the values of all attributes of a kind, which are not empty.
func attributeValues(attributes []byte, kind uint16) (values [][]byte) {
	list, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return nil
	}
	for _, a := range list {
		if a.Attr.Type&nl.NLA_TYPE_MASK == kind && len(a.Value) > 0 {
			values = append(values, a.Value)
		}
	}
	return values
}

// setPatience is how long a set may be in use after the rules that used it are
// gone: the kernel lets go of these a moment later.
const setPatience = 5 * time.Second

func (s *kubeProxySet) destroy() error {
	end := time.Now().Add(setPatience)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := netlink.IpsetDestroy(s.name)
		switch {
		case err == nil || errors.Is(err, unix.ENOENT):
			return nil
		case time.Now().After(end):
			return fmt.Errorf("destroy the set %s: %w", s.name, err)
		}
		time.Sleep(wait)
	}
}
