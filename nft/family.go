// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// IPFamily holds what differs between the two IP families in rules.
type IPFamily struct {
	plan.Family
	Word          string // nft's name of the table family and of the header
	AddrLen       int    // bytes of an address
	SaddrOffset   uint32 // of the source address in the header
	DaddrOffset   uint32
	Table         nftables.TableFamily
	addrType      nftables.SetDatatype
	loopback      netip.Prefix
	rejectUnreach uint8 // ICMP code of "port unreachable"
}

// FamilyOf returns what nf_tables needs to know about an IP family.
func FamilyOf(f plan.Family) *IPFamily {
	if f == plan.IPv6 {
		return &IPFamily{
			Family: f, Word: "ip6", AddrLen: 16, SaddrOffset: 8, DaddrOffset: 24,
			Table: nftables.TableFamilyIPv6, addrType: nftables.TypeIP6Addr,
			loopback:      netip.MustParsePrefix("::1/128"),
			rejectUnreach: 4,
		}
	}
	return &IPFamily{
		Family: f, Word: "ip", AddrLen: 4, SaddrOffset: 12, DaddrOffset: 16,
		Table: nftables.TableFamilyIPv4, addrType: nftables.TypeIPAddr,
		loopback:      netip.MustParsePrefix("127.0.0.0/8"),
		rejectUnreach: 3,
	}
}

// rejectType is ICMP destination unreachable with the family's own code.
const rejectType = unix.NFT_REJECT_ICMP_UNREACH

// Holds says whether the address is a valid address of this family. An IPv4-mapped IPv6
// address belongs to neither family.
func (f *IPFamily) Holds(a netip.Addr) bool {
	return a.IsValid() && a.BitLen() == f.HostBits() && !a.Is4In6() && a.Zone() == ""
}

// Keys and data are concatenations of fields, each padded to a multiple of
// four bytes as in the kernel's registers.

// AppendAddr appends an address field.
func AppendAddr(b []byte, a netip.Addr) []byte { return append(b, a.AsSlice()...) }

// AppendPort appends a port field.
func AppendPort(b []byte, port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(b, port), 0, 0)
}

// AppendProto appends a protocol field.
func AppendProto(b []byte, p plan.Protocol) []byte { return append(b, byte(p), 0, 0, 0) }

// AppendID appends a value in the machine's byte order: an id, a mark or a slot.
func AppendID(b []byte, id uint32) []byte { return binary.NativeEndian.AppendUint32(b, id) }

// Disjoint sorts the prefixes and drops those that lie in others: nf_tables refuses
// intervals that overlap.
func Disjoint(prefixes []netip.Prefix) []netip.Prefix {
	sorted := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		sorted = append(sorted, p.Masked())
	}
	slices.SortFunc(sorted, netip.Prefix.Compare)
	kept := sorted[:0]
	for _, p := range sorted {
		// A prefix sorts before all that it holds.
		if n := len(kept); n > 0 && kept[n-1].Overlaps(p) {
			continue
		}
		kept = append(kept, p)
	}
	return kept
}

// LastAddr is the highest address of a prefix.
func LastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
