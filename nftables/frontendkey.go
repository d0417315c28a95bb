package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"signalbox/proxier/plan"
	"slices"
)

// frontendKey are the fields of maps by frontend, nodePortKey those of maps by node port.
var (
	frontendKey = []fieldType{addrField, protoField, portField}
	nodePortKey = []fieldType{protoField, portField}
)

// ValidateNode refuses facts that could not be written as rules.
func ValidateNode(f *family, n plan.Node) error {
	for _, p := range slices.Concat(n.LocalPods.Prefixes, n.OwnPods, n.ServiceCIDRs) {
		if !p.IsValid() || !f.holds(p.Addr()) {
			return fmt.Errorf("node: prefix %s is not of %s", p, f.Family)
		}
	}
	for _, s := range n.RouteSources {
		if !f.holds(s.Destination.Addr()) || s.Source.IsValid() && !f.holds(s.Source) {
			return fmt.Errorf("node: the route source %s is not of %s", s, f.Family)
		}
	}
	for _, a := range n.NodePortAddrs.Addrs {
		if !f.holds(a) {
			return fmt.Errorf("node: address for NodePorts %s is not of %s", a, f.Family)
		}
	}
	return nil
}

// frontendBytes is the key of a map by frontend, or, for a node port, of one by node
// port.
func frontendBytes(k plan.FrontendKey) string {
	b := make([]byte, 0, 24)
	if k.Addr.IsValid() {
		b = appendAddr(b, k.Addr)
	}
	return string(appendPort(appendProto(b, k.Protocol), k.Port))
}

// frontendOf reads a key of a map by frontend or node port.
func frontendOf(f *family, fields []fieldType, key []byte) plan.FrontendKey {
	var k plan.FrontendKey
	for _, field := range fields {
		n := field.size(f)
		if len(key) < n {
			return plan.FrontendKey{}
		}
		switch field {
		case addrField:
			k.Addr, _ = netip.AddrFromSlice(key[:n])
		case protoField:
			k.Protocol = plan.Protocol(key[0])
		case portField:
			k.Port = binary.BigEndian.Uint16(key)
		}
		key = key[n:]
	}
	return k
}

// FrontendOfBytes reads what FrontendBytes writes; byNodePort says that there is
// no address in it.
func FrontendOfBytes(f *IPFamily, key []byte, byNodePort bool) plan.FrontendKey {
	if byNodePort {
		return frontendOf(f, nodePortKey, key)
	}
	return frontendOf(f, frontendKey, key)
}
