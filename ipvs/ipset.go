package ipvs

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// kubeProxySets are the sets of kube-proxy's ipvs mode, by their names for
// IPv4. The value is the protocol of a set of NodePorts that holds nothing but
// ports, else 0.
var kubeProxySets = map[string]proxier.Protocol{
	"KUBE-LOOP-BACK": 0, "KUBE-CLUSTER-IP": 0, "KUBE-EXTERNAL-IP": 0, "KUBE-EXTERNAL-IP-LOCAL": 0,
	"KUBE-LOAD-BALANCER": 0, "KUBE-LOAD-BALANCER-LOCAL": 0, "KUBE-LOAD-BALANCER-FW": 0,
	"KUBE-LOAD-BALANCER-SOURCE-IP": 0, "KUBE-LOAD-BALANCER-SOURCE-CIDR": 0,
	"KUBE-NODE-PORT-TCP": proxier.TCP, "KUBE-NODE-PORT-LOCAL-TCP": proxier.TCP,
	"KUBE-NODE-PORT-UDP": proxier.UDP, "KUBE-NODE-PORT-LOCAL-UDP": proxier.UDP,
	"KUBE-NODE-PORT-SCTP-HASH": 0, "KUBE-NODE-PORT-LOCAL-SCTP-HASH": 0,
	"KUBE-HEALTH-CHECK-NODE-PORT": 0, "KUBE-IPVS-IPS": 0,
}

// longestSetName is what the kernel keeps of a set's name (IPSET_MAXNAMELEN
// with the byte that ends it): kube-proxy cuts what is longer.
const longestSetName = 31

// setName is kube-proxy's name for a set of a family.
func setName(name string, f proxier.Family) string {
	if f == proxier.IPv6 {
		name = "KUBE-6-" + strings.TrimPrefix(name, "KUBE-")
	}
	return name[:min(len(name), longestSetName)]
}

// kubeProxySet is what one of the sets tells of virtual servers.
type kubeProxySet struct {
	name     string
	protocol proxier.Protocol // of ports
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
func readSets(f proxier.Family) ([]kubeProxySet, error) {
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
		sets = append(sets, parseSet(name, protocol, result))
	}
	return sets, nil
}

// listSet asks a library that panics on an error that is not the kernel's.
func listSet(name string) (result *netlink.IPSetResult, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	return netlink.IpsetList(name)
}

func parseSet(name string, protocol proxier.Protocol, result *netlink.IPSetResult) kubeProxySet {
	s := kubeProxySet{name: name, protocol: protocol}
	if protocol != 0 {
		s.ports = make(map[uint16]bool)
	} else {
		s.servers = make(map[serverKey]bool)
	}
	for _, e := range result.Entries {
		switch {
		case e.Port == nil || e.IP2 != nil: // the latter are of endpoints
		case s.ports != nil:
			s.ports[*e.Port] = true
		case e.Protocol != nil:
			if a, ok := netip.AddrFromSlice(e.IP); ok {
				s.servers[serverKey{addr: a, port: *e.Port, protocol: proxier.Protocol(*e.Protocol)}] = true
			}
		}
	}
	return s
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
