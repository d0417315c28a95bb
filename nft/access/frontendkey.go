package access

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"signalbox/nft"
	"signalbox/proxier/plan"
	"slices"
)

// frontendKey are the fields of maps by frontend, nodePortKey those of maps by node port.
var (
	FrontendKey = []nft.Field{nft.AddrField, nft.ProtoField, nft.PortField}
	NodePortKey = []nft.Field{nft.ProtoField, nft.PortField}
)

// ValidateNode refuses facts that could not be written as rules.
func ValidateNode(f *nft.IPFamily, n plan.Node) error {
	for _, p := range slices.Concat(n.LocalPods.Prefixes, n.OwnPods, n.ServiceCIDRs) {
		if !p.IsValid() || !f.Holds(p.Addr()) {
			return fmt.Errorf("node: prefix %s is not of %s", p, f.Family)
		}
	}
	for _, s := range n.RouteSources {
		if !f.Holds(s.Destination.Addr()) || s.Source.IsValid() && !f.Holds(s.Source) {
			return fmt.Errorf("node: the route source %s is not of %s", s, f.Family)
		}
	}
	for _, a := range n.NodePortAddrs.Addrs {
		if !f.Holds(a) {
			return fmt.Errorf("node: address for NodePorts %s is not of %s", a, f.Family)
		}
	}
	return nil
}

// FrontendBytes is the key of a map by frontend, or, for a node port, of one by node
// port.
func FrontendBytes(k plan.FrontendKey) string {
	b := make([]byte, 0, 24)
	if k.Addr.IsValid() {
		b = nft.AppendAddr(b, k.Addr)
	}
	return string(nft.AppendPort(nft.AppendProto(b, k.Protocol), k.Port))
}

// frontendOf reads a key of a map by frontend or node port.
func frontendOf(f *nft.IPFamily, fields []nft.Field, key []byte) plan.FrontendKey {
	var k plan.FrontendKey
	for _, field := range fields {
		n := field.Size(f)
		if len(key) < n {
			return plan.FrontendKey{}
		}
		switch field {
		case nft.AddrField:
			k.Addr, _ = netip.AddrFromSlice(key[:n])
		case nft.ProtoField:
			k.Protocol = plan.Protocol(key[0])
		case nft.PortField:
			k.Port = binary.BigEndian.Uint16(key)
		}
		key = key[n:]
	}
	return k
}

// FrontendOfBytes reads what FrontendBytes writes; byNodePort says that there is
// no address in it.
func FrontendOfBytes(f *nft.IPFamily, key []byte, byNodePort bool) plan.FrontendKey {
	if byNodePort {
		return frontendOf(f, NodePortKey, key)
	}
	return frontendOf(f, FrontendKey, key)
}
