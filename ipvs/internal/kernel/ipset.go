// SPDX-License-Identifier: Apache-2.0

package kernel

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

// HasKubeProxySets says whether there are ipsets of kube-proxy's ipvs mode, which makes them
// with each sync.
func HasKubeProxySets(f plan.Family) bool {
	_, err := listSet(KubeProxySetName("KUBE-CLUSTER-IP", f))
	return err == nil
}

// kubeProxySets are the ipsets of kube-proxy's ipvs mode, by their names for IPv4. The value
// is the protocol of a set of NodePorts whose entries are only ports, else 0.
var kubeProxySets = map[string]plan.Protocol{
	"KUBE-LOOP-BACK": 0, "KUBE-CLUSTER-IP": 0, "KUBE-EXTERNAL-IP": 0, "KUBE-EXTERNAL-IP-LOCAL": 0,
	"KUBE-LOAD-BALANCER": 0, "KUBE-LOAD-BALANCER-LOCAL": 0, "KUBE-LOAD-BALANCER-FW": 0,
	"KUBE-LOAD-BALANCER-SOURCE-IP": 0, "KUBE-LOAD-BALANCER-SOURCE-CIDR": 0,
	"KUBE-NODE-PORT-TCP": plan.TCP, "KUBE-NODE-PORT-LOCAL-TCP": plan.TCP,
	"KUBE-NODE-PORT-UDP": plan.UDP, "KUBE-NODE-PORT-LOCAL-UDP": plan.UDP,
	"KUBE-NODE-PORT-SCTP-HASH": 0, "KUBE-NODE-PORT-LOCAL-SCTP-HASH": 0,
	"KUBE-HEALTH-CHECK-NODE-PORT": 0, "KUBE-IPVS-IPS": 0,
}

// longestSetName is the kernel's limit (IPSET_MAXNAMELEN includes the final zero byte).
// kube-proxy cuts longer names.
const longestSetName = 31

// KubeProxySetName is kube-proxy's name for a set of a family.
func KubeProxySetName(name string, f plan.Family) string {
	if f == plan.IPv6 {
		name = "KUBE-6-" + strings.TrimPrefix(name, "KUBE-")
	}
	return name[:min(len(name), longestSetName)]
}

// KubeProxySet has the virtual servers that one ipset names.
type KubeProxySet struct {
	name     string
	protocol plan.Protocol // of ports
	// ports are NodePorts, and servers have an address. One of the two is nil.
	ports   map[uint16]bool
	servers map[ServerKey]bool
}

// Names says whether the set names a virtual server. A set of NodePorts names servers at
// the node's addresses.
func (s *KubeProxySet) Names(key ServerKey, isLocal func(netip.Addr) bool) bool {
	if s.ports != nil {
		return s.protocol == key.Protocol && s.ports[key.Port] && isLocal(key.Addr)
	}
	return s.servers[key]
}

// ReadKubeProxySets reads the ipsets of kube-proxy that exist.
func ReadKubeProxySets(f plan.Family) ([]KubeProxySet, error) {
	var sets []KubeProxySet
	for name, protocol := range kubeProxySets {
		name = KubeProxySetName(name, f)
		result, err := listSet(name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.EINVAL) { // nfnetlink has no ipset
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

// listSet returns the kernel's messages about a set. The library could parse them, but logs two
// lines for each set since kernel 5.11, because it does not know the new attributes.
func listSet(name string) ([][]byte, error) {
	req := nl.NewNetlinkRequest(nl.IPSET_CMD_LIST|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(nl.IPSET_CMD_LIST))
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_NETLINK, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)))
	return req.Execute(unix.NETLINK_NETFILTER, 0)
}

func parseSet(name string, protocol plan.Protocol, messages [][]byte) (KubeProxySet, error) {
	s := KubeProxySet{name: name, protocol: protocol}
	if protocol != 0 {
		s.ports = make(map[uint16]bool)
	} else {
		s.servers = make(map[ServerKey]bool)
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

// add adds an entry that has a port.
func (s *KubeProxySet) add(entry []byte) {
	ports, endpoints := attributeValues(entry, nl.IPSET_ATTR_PORT), attributeValues(entry, nl.IPSET_ATTR_IP2)
	if len(ports) == 0 || len(ports[0]) != 2 || len(endpoints) > 0 {
		return
	}
	key := ServerKey{Port: binary.BigEndian.Uint16(ports[0])}
	if s.ports != nil {
		s.ports[key.Port] = true
		return
	}
	for _, p := range attributeValues(entry, nl.IPSET_ATTR_PROTO) {
		key.Protocol = plan.Protocol(p[0])
	}
	for _, ip := range attributeValues(entry, nl.IPSET_ATTR_IP) {
		for _, raw := range slices.Concat(attributeValues(ip, nl.IPSET_ATTR_IPADDR_IPV4), attributeValues(ip, nl.IPSET_ATTR_IPADDR_IPV6)) {
			key.Addr, _ = netip.AddrFromSlice(raw)
		}
	}
	if key.Protocol != 0 && key.Addr.IsValid() {
		s.servers[key] = true
	}
}

// attributeValues returns the values of all attributes of a kind. No value is empty.
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

// destroyTimeout limits how long the kernel may use a set after its rules are gone. It frees
// them a moment later.
const destroyTimeout = 5 * time.Second

// Destroy removes the ipset.
func (s *KubeProxySet) Destroy() error {
	end := time.Now().Add(destroyTimeout)
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
