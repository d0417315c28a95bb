package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	nft "github.com/google/nftables"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// tableName is not kube-proxy's, so that a takeover can write this table first
// and remove the other afterwards, with no moment without rules.
const tableName = "signalbox"

// family holds what differs between the two IP families in rules.
type family struct {
	plan.Family
	word          string // nft's name of the table family and of the header
	addrLen       int    // bytes of an address
	saddrOff      uint32 // offset of the source address in the header
	daddrOff      uint32
	table         nft.TableFamily
	addrType      nft.SetDatatype
	loopback      netip.Prefix
	rejectUnreach uint8 // ICMP code of "port unreachable"
}

func familyOf(f plan.Family) *family {
	if f == plan.IPv6 {
		return &family{
			Family: f, word: "ip6", addrLen: 16, saddrOff: 8, daddrOff: 24,
			table: nft.TableFamilyIPv6, addrType: nft.TypeIP6Addr,
			loopback:      netip.MustParsePrefix("::1/128"),
			rejectUnreach: 4,
		}
	}
	return &family{
		Family: f, word: "ip", addrLen: 4, saddrOff: 12, daddrOff: 16,
		table: nft.TableFamilyIPv4, addrType: nft.TypeIPAddr,
		loopback:      netip.MustParsePrefix("127.0.0.0/8"),
		rejectUnreach: 3,
	}
}

// rejectType is ICMP destination unreachable with the family's own code.
const rejectType = unix.NFT_REJECT_ICMP_UNREACH

// holds says whether an address is one of this family: a valid address of its
// length. An IPv4-mapped IPv6 address belongs to neither.
func (f *family) holds(a netip.Addr) bool {
	return a.IsValid() && a.BitLen() == f.HostBits() && !a.Is4In6() && a.Zone() == ""
}

// Keys and data are concatenations of fields, each padded to a multiple of
// four bytes as in the kernel's registers.

func appendAddr(b []byte, a netip.Addr) []byte { return append(b, a.AsSlice()...) }

func appendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}

func appendProto(b []byte, p plan.Protocol) []byte { return append(b, byte(p), 0, 0, 0) }

// appendID appends a value that the kernel holds in the machine's byte order:
// an id or a slot.
func appendID(b []byte, id uint32) []byte { return binary.NativeEndian.AppendUint32(b, id) }

// ValidateNode refuses facts that could not be written as rules.
func (f *family) ValidateNode(n plan.Node) error {
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
