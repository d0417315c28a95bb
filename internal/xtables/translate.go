// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// This file writes rules as iptables-nft stores them. Addresses, protocols and interfaces
// are expressions of nf_tables, all other matches and targets are those of xtables. Newer
// versions of iptables-nft write expressions for more matches. Older ones could not read
// those, but all versions read these.

// errNoNetlink says that only the tools can write a rule.
var errNoNetlink = errors.New("the rule has no netlink form")

// translation is a rule on its way from text to expressions.
type translation struct {
	*batch
	family   *nft.IPFamily
	rest     string // of the text
	negated  bool   // "!" stands before the option that is read
	protocol uint8
	// matchesPorts says that a match of xtables requires the protocol.
	matchesPorts bool
	err          error // the first
}

// translate adds a rule to the batch: see Chain.Rules. The batch is useless after an error.
func (b *batch) translate(f *nft.IPFamily, table, chain, rule string) error {
	t := translation{batch: b, family: f, rest: rule}
	b.addRule(table, chain, func() uint8 {
		t.options(t.basic)
		if t.rest != "" {
			t.fail("%q", t.rest)
		}
		if t.matchesPorts {
			return t.protocol
		}
		return 0
	})
	return t.err
}

// next reads a word, or several in quotation marks; "" after the last.
func (t *translation) next() (word string) {
	end := " "
	if quoted, ok := strings.CutPrefix(t.rest, `"`); ok {
		t.rest, end = quoted, `"`
	}
	word, t.rest, _ = strings.Cut(t.rest, end)
	t.rest = strings.TrimLeft(t.rest, " ")
	return word
}

func (t *translation) fail(format string, args ...any) {
	if t.err == nil {
		t.err = fmt.Errorf("%w: %w", errNoNetlink, fmt.Errorf(format, args...))
	}
}

// options reads options until read does not know one.
func (t *translation) options(read func(option string) (known bool)) {
	t.rest = strings.TrimLeft(t.rest, " ")
	for t.rest != "" && t.err == nil {
		before := t.rest
		option := t.next()
		if t.negated = option == "!"; t.negated {
			option = t.next()
		}
		known := read(option)
		if t.negated && known {
			t.fail("! %s", option)
		}
		t.negated = false
		if !known {
			t.rest = before
			return
		}
	}
}

// not says whether the option is negated.
func (t *translation) not() bool {
	negated := t.negated
	t.negated = false
	return negated
}

// basic reads an option that belongs to no match and no target.
func (t *translation) basic(option string) bool {
	if t.negated && slices.Contains([]string{"-m", "-j", "-g"}, option) {
		return false
	}
	switch option {
	case "-s":
		t.address(t.family.SaddrOffset)
	case "-d":
		t.address(t.family.DaddrOffset)
	case "-p":
		t.readProtocol()
	case "-i":
		t.link(unix.NFT_META_IIFNAME)
	case "-o":
		t.link(unix.NFT_META_OIFNAME)
	case "-m":
		t.match(t.next())
	case "-j":
		t.counter()
		t.target(t.next())
	case "-g":
		t.counter()
		t.verdict(unix.NFT_GOTO, t.next())
	default:
		return false
	}
	return true
}

func (t *translation) address(offset uint32) {
	address, mask := t.network()
	if !slices.ContainsFunc(mask, func(b byte) bool { return b != 0 }) {
		return // any address; "!" fails
	}
	t.loadHeader(offset, len(address))
	if slices.ContainsFunc(mask, func(b byte) bool { return b != 0xff }) {
		t.and(mask)
	}
	t.compare(address, t.not())
}

// network reads an address and its mask, as a number of bits or an address.
func (t *translation) network() (address, mask []byte) {
	word := t.next()
	text, bits, _ := strings.Cut(word, "/")
	if n, err := strconv.Atoi(bits); err == nil {
		mask = net.CIDRMask(n, t.family.HostBits())
	} else {
		mask = t.ip(bits)
	}
	address = t.ip(text)
	if address == nil || mask == nil {
		t.fail("%q", word)
		return nil, nil
	}
	for i := range address {
		address[i] &= mask[i]
	}
	return address, mask
}

// ip is nil for text that is no address of the family.
func (t *translation) ip(text string) []byte {
	a, err := netip.ParseAddr(text)
	if err != nil || a.BitLen() != t.family.HostBits() {
		return nil
	}
	return a.AsSlice()
}

func (t *translation) readProtocol() {
	name := t.next()
	i := slices.IndexFunc(plan.Protocols, func(p plan.Protocol) bool { return p.String() == name })
	if i < 0 {
		t.fail("-p %q", name)
		return
	}
	t.protocol = uint8(plan.Protocols[i])
	t.loadMeta(unix.NFT_META_L4PROTO)
	t.compare([]byte{t.protocol}, t.not())
}

// link compares the name of an interface with its terminating zero, or without it if the
// name is the beginning of names.
func (t *translation) link(key uint32) {
	name := t.next()
	data, wildcard := strings.CutSuffix(name, "+")
	if data == "" || len(name) >= unix.IFNAMSIZ {
		t.fail("interface %q", name)
		return
	}
	if !wildcard {
		data += "\x00"
	}
	t.loadMeta(key)
	t.compare([]byte(data), t.not())
}

// Matches and targets are structures in the machine's byte order, in the revision that
// iptables-nft chooses. Their sizes are multiples of 8.

func put(info []byte, offset int, n uint32) { binary.NativeEndian.PutUint32(info[offset:], n) }

func put16(info []byte, offset int, n uint16) { binary.NativeEndian.PutUint16(info[offset:], n) }

func (t *translation) match(name string) {
	switch name {
	case "comment":
		t.comment()
	case "tcp", "udp", "sctp":
		t.ports(name)
	case "addrtype":
		t.addressType()
	case "conntrack":
		t.conntrack()
	case "mark":
		t.mark()
	case "recent":
		t.recent()
	case "statistic":
		t.statistic()
	default:
		t.fail("-m %q", name)
	}
}

func (t *translation) comment() {
	var info [256]byte // struct xt_comment_info
	t.options(func(option string) bool {
		if option == "--comment" {
			if n := copy(info[:], t.next()); n == len(info) {
				t.fail("a comment of %d bytes", n)
			}
		}
		return option == "--comment"
	})
	t.extension("match", "comment", 0, info[:])
}

// tcpFlags are those of the TCP header.
var tcpFlags = map[string]byte{"FIN": 1 << 0, "SYN": 1 << 1, "RST": 1 << 2, "ACK": 1 << 4}

// flags reads names of TCP flags.
func (t *translation) flags() (bits byte) {
	for name := range strings.SplitSeq(t.next(), ",") {
		if tcpFlags[name] == 0 {
			t.fail("%q", name)
		}
		bits |= tcpFlags[name]
	}
	return bits
}

// ports reads the destination ports of a protocol, or flags of TCP.
func (t *translation) ports(protocol string) {
	t.matchesPorts = true
	ports := [2]uint16{0, math.MaxUint16}
	var mask, flags, inverted byte
	t.options(func(option string) bool {
		if option == "--dport" {
			first, last, isRange := strings.Cut(t.next(), ":")
			if !isRange {
				last = first
			}
			ports = [2]uint16{uint16(t.parse(first, 16)), uint16(t.parse(last, 16))}
			return true
		}
		if option == "--tcp-flags" && protocol == "tcp" {
			mask, flags = t.flags(), t.flags()
			if t.not() {
				inverted = 1 << 2
			}
			return true
		}
		return false
	})
	if protocol == "sctp" {
		t.sctp(ports)
		return
	}
	// struct xt_tcp or xt_udp: source ports, destination ports, and for TCP an option, flags
	// and what is inverted.
	var info [16]byte
	put16(info[:], 2, math.MaxUint16)
	put16(info[:], 4, ports[0])
	put16(info[:], 6, ports[1])
	info[9], info[10], info[11] = mask, flags, inverted
	t.extension("match", protocol, 0, info[:])
}

// parse reads an unsigned number, hexadecimal after 0x.
func (t *translation) parse(text string, bits int) uint64 {
	n, err := strconv.ParseUint(text, 0, bits)
	if err != nil {
		t.fail("%w", err)
	}
	return n
}

// sctp is struct xt_sctp_info with destination ports alone.
func (t *translation) sctp(ports [2]uint16) {
	const flagInfo, flags, destinationPorts = 268, 284, 1 << 1
	var info [296]byte
	put16(info[:], 0, ports[0])
	put16(info[:], 2, ports[1])
	for i := range 4 {
		info[flagInfo+3*i] = 0xff // no type of chunk
	}
	put(info[:], flags, destinationPorts)
	t.extension("match", "sctp", 0, info[:])
}

// addressType is struct xt_addrtype_info_v1: types of the source and of the destination,
// and flags that negate them.
func (t *translation) addressType() {
	var info [8]byte
	t.options(func(option string) bool {
		offset, inverted := 0, byte(1<<0)
		switch option {
		case "--src-type":
		case "--dst-type":
			offset, inverted = 2, 1<<1
		default:
			return false
		}
		if name := t.next(); name != "LOCAL" {
			t.fail("%s %q", option, name)
		}
		put16(info[:], offset, 1<<unix.RTN_LOCAL)
		if t.not() {
			put(info[:], 4, binary.NativeEndian.Uint32(info[4:])|uint32(inverted))
		}
		return true
	})
	t.extension("match", "addrtype", 1, info[:])
}

// conntrackBits are XT_CONNTRACK_STATE_ and IPS_.
var conntrackBits = map[string]uint16{"INVALID": 1 << 0, "ESTABLISHED": 1 << 1, "RELATED": 1 << 2, "DNAT": 1 << 7, "CONFIRMED": 1 << 3}

// conntrack is struct xt_conntrack_mtinfo3.
func (t *translation) conntrack() {
	const originalSource, originalMask, matchFlags, invertFlags, states, statuses = 0, 16, 146, 148, 150, 152
	var info [168]byte
	t.options(func(option string) bool {
		var field uint16
		switch option {
		case "--ctstate":
			field = 1 << 0
			put16(info[:], states, t.bits())
		case "--ctstatus":
			field = 1 << 6
			put16(info[:], statuses, t.bits())
		case "--ctorigsrc":
			field = 1 << 2
			address, mask := t.network()
			copy(info[originalSource:], address)
			copy(info[originalMask:], mask)
		default:
			return false
		}
		put16(info[:], matchFlags, binary.NativeEndian.Uint16(info[matchFlags:])|field)
		if t.not() {
			put16(info[:], invertFlags, binary.NativeEndian.Uint16(info[invertFlags:])|field)
		}
		return true
	})
	t.extension("match", "conntrack", 3, info[:])
}

// bits reads names with commas between them.
func (t *translation) bits() (bits uint16) {
	for name := range strings.SplitSeq(t.next(), ",") {
		if conntrackBits[name] == 0 {
			t.fail("%q", name)
		}
		bits |= conntrackBits[name]
	}
	return bits
}

// mark is struct xt_mark_mtinfo1.
func (t *translation) mark() {
	var info [16]byte
	t.options(func(option string) bool {
		if option != "--mark" {
			return false
		}
		value, mask, _ := strings.Cut(t.next(), "/")
		put(info[:], 0, uint32(t.parse(value, 32)))
		put(info[:], 4, uint32(t.parse(mask, 32)))
		if t.not() {
			info[8] = 1
		}
		return true
	})
	t.extension("match", "mark", 1, info[:])
}

// recent is struct xt_recent_mtinfo_v1, for sources whose every bit counts.
func (t *translation) recent() {
	const check, name, side, mask, end = 8, 10, 210, 212, 228
	var info [232]byte
	for i := mask; i < end; i++ {
		info[i] = 0xff
	}
	t.options(func(option string) bool {
		switch option {
		case "--rcheck":
			info[check] |= 1 << 0
		case "--set":
			info[check] |= 1 << 1
		case "--reap":
			info[check] |= 1 << 5
		case "--seconds":
			put(info[:], 0, uint32(t.parse(t.next(), 32)))
		case "--name":
			if n := copy(info[name:side], t.next()); n == side-name {
				t.fail("a name of %d bytes", n)
			}
		case "--rsource":
		default:
			return false
		}
		return true
	})
	t.extension("match", "recent", 1, info[:])
}

// statistic is struct xt_statistic_info in random mode.
func (t *translation) statistic() {
	var info [24]byte
	t.options(func(option string) bool {
		switch option {
		case "--mode":
			if mode := t.next(); mode != "random" {
				t.fail("--mode %q", mode)
			}
		case "--probability":
			p, err := strconv.ParseFloat(t.next(), 64)
			if err != nil || p < 0 || p > 1 {
				t.fail("--probability %v: %v", p, err)
			}
			put(info[:], 4, uint32(math.Round(p*(1<<31))))
		default:
			return false
		}
		return true
	})
	t.extension("match", "statistic", 0, info[:])
}

func (t *translation) target(name string) {
	switch name {
	case "ACCEPT":
		t.verdict(accept, "")
	case "DROP":
		t.verdict(drop, "")
	case "RETURN":
		t.verdict(unix.NFT_RETURN, "")
	case "DNAT":
		t.destinationNAT()
	case "SNAT", "MASQUERADE":
		t.sourceNAT(name)
	case "MARK":
		t.setMark()
	case "REJECT":
		t.reject()
	default:
		t.verdict(unix.NFT_JUMP, name)
	}
}

// Flags of a range of addresses and ports: NF_NAT_RANGE_.
const (
	mapAddresses = 1 << 0
	mapPorts     = 1 << 1
	anyPort      = 1 << 4 // PROTO_RANDOM_FULLY
)

// destinationNAT is struct nf_nat_range2.
func (t *translation) destinationNAT() {
	var info [48]byte
	t.options(func(option string) bool {
		if option != "--to-destination" {
			return false
		}
		word := t.next()
		to, err := netip.ParseAddrPort(word)
		if err != nil || to.Addr().BitLen() != t.family.HostBits() {
			t.fail("%s %q", option, word)
		}
		put(info[:], 0, mapAddresses|mapPorts)
		for _, offset := range []int{4, 20} {
			copy(info[offset:], to.Addr().AsSlice())
		}
		for _, offset := range []int{36, 38} {
			binary.BigEndian.PutUint16(info[offset:], to.Port())
		}
		return true
	})
	t.extension("target", "DNAT", 2, info[:])
}

// sourceNAT is struct nf_nat_ipv4_multi_range_compat with one range, or for IPv6 struct
// nf_nat_range.
func (t *translation) sourceNAT(name string) {
	info, flags, addresses, revision := make([]byte, 24), 4, []int{8, 12}, uint32(0)
	put(info, 0, 1)
	if t.family.Family == plan.IPv6 {
		info, flags, addresses = make([]byte, 40), 0, []int{4, 20}
		if name == "SNAT" {
			revision = 1
		}
	}
	var flag byte
	t.options(func(option string) bool {
		switch option {
		case "--to-source":
			word := t.next()
			ip := t.ip(word)
			if ip == nil {
				t.fail("%s %q", option, word)
			}
			flag |= mapAddresses
			for _, offset := range addresses {
				copy(info[offset:], ip)
			}
		case "--random-fully":
			flag |= anyPort
		default:
			return false
		}
		return true
	})
	put(info, flags, uint32(flag))
	t.extension("target", name, revision, info)
}

// setMark is struct xt_mark_tginfo2: the bits to invert after those to clear.
func (t *translation) setMark() {
	var info [8]byte
	t.options(func(option string) bool {
		switch option {
		case "--or-mark":
			bits := uint32(t.parse(t.next(), 32))
			put(info[:], 0, bits)
			put(info[:], 4, bits)
		case "--xor-mark":
			put(info[:], 0, uint32(t.parse(t.next(), 32)))
		default:
			return false
		}
		return true
	})
	t.extension("target", "MARK", 2, info[:])
}

// reject is struct ipt_reject_info or ip6t_reject_info: the port is unreachable, or a
// reset.
func (t *translation) reject() {
	var info [8]byte
	unreachable, reset := uint32(3), uint32(7)
	if t.family.Family == plan.IPv6 {
		unreachable, reset = 4, 6
	}
	with := unreachable
	t.options(func(option string) bool {
		if option != "--reject-with" {
			return false
		}
		if word := t.next(); word != "tcp-reset" {
			t.fail("%s %q", option, word)
		}
		with = reset
		return true
	})
	put(info[:], 0, with)
	t.extension("target", "REJECT", 0, info[:])
}
