// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// Message types, attributes and flags of <linux/netfilter/nfnetlink_conntrack.h>
// and <linux/netfilter/nf_conntrack_common.h>.
const (
	msgNew      = unix.NFNL_SUBSYS_CTNETLINK << 8
	msgGet      = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	msgDelete   = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
	msgGetStats = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5

	ctaTupleOrig       = 1
	ctaTupleReply      = 2
	ctaStatus          = 3
	ctaProtoInfo       = 4
	ctaID              = 12
	ctaZone            = 18
	ctaFilter          = 25
	ctaFilterOrigFlags = 1

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaProtoInfoTCP   = 1
	ctaProtoInfoSCTP  = 3
	ctaProtoInfoState = 1 // of either

	statusSeenReply = 1 << 1 // IPS_SEEN_REPLY
	statusAssured   = 1 << 2 // IPS_ASSURED

	filterProtoNum = 1 << 3 // compare the protocol number of the tuple

	attrTypeMask = 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
)

// table is the connection tracking table of the network namespace in which it
// was opened. It is used by one goroutine at a time.
//
// The netlink library does not read a flow's status and cannot list UDP alone, so
// table reads the few attributes that it needs, over the library's sockets.
type table struct {
	socket *nl.SocketHandle
	// unfiltered is set after the kernel has refused to list one protocol alone.
	unfiltered bool
}

// socketTimeout bounds the wait for the kernel's answer. A lost answer fails one
// scan and does not block the goroutine.
var socketTimeout = unix.Timeval{Sec: 10}

func openTable() (*table, error) {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, unsupported(err)
	}
	_ = s.SetSendTimeout(&socketTimeout)
	_ = s.SetReceiveTimeout(&socketTimeout)
	t := &table{socket: &nl.SocketHandle{Socket: s}}
	answered := false
	err = t.request(msgGetStats, unix.NLM_F_ACK, plan.IPv4).ExecuteIter(unix.NETLINK_NETFILTER, 0, func([]byte) bool {
		answered = true
		return true
	})
	if err == nil && !answered {
		err = errors.New("the kernel did not answer")
	}
	if err != nil {
		s.Close()
		return nil, unsupported(err)
	}
	return t, nil
}

func (t *table) close() { t.socket.Close() }

func (t *table) request(message, flags int, family plan.Family) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(message, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: t.socket}
	af := uint8(unix.AF_INET)
	if family == plan.IPv6 {
		af = unix.AF_INET6
	}
	req.AddData(&nl.Nfgenmsg{NfgenFamily: af, Version: nl.NFNETLINK_V0})
	return req
}

// each calls fn with every flow of a family and a protocol. fn must copy a handle that
// it keeps, and must not use the table. After netlink.ErrDumpInterrupted some flows
// may be missing.
func (t *table) each(family plan.Family, protocol plan.Protocol, fn func(*flow)) error {
	err := t.dump(family, protocol, fn)
	if !t.unfiltered && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
		t.unfiltered = true
		err = t.dump(family, protocol, fn)
	}
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing the %s flows: %w", family, err)
	}
	return err
}

func (t *table) dump(family plan.Family, protocol plan.Protocol, fn func(*flow)) error {
	req := t.request(msgGet, unix.NLM_F_DUMP, family)
	if !t.unfiltered {
		// Kernels before 5.8 do not know the filter and list everything.
		proto := nl.NewRtAttr(unix.NLA_F_NESTED|ctaTupleProto, nil)
		proto.AddRtAttr(ctaProtoNum, nl.Uint8Attr(uint8(protocol)))
		tuple := nl.NewRtAttr(unix.NLA_F_NESTED|ctaTupleOrig, nil)
		tuple.AddChild(proto)
		filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
		filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(filterProtoNum))
		req.AddData(tuple)
		req.AddData(filter)
	}
	var f flow
	return req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		if f.parse(msg) && f.protocol == protocol {
			fn(&f)
		}
		return true
	})
}

// remove deletes the flow with that handle, if it still exists.
func (t *table) remove(family plan.Family, handle []byte) error {
	req := t.request(msgDelete, unix.NLM_F_ACK, family)
	req.AddRawData(handle)
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing an %s flow: %w", family, err)
	}
	return nil
}

// parse reads one message of a dump. It returns false for anything but a complete
// flow with ports.
func (f *flow) parse(msg []byte) bool {
	*f = flow{handle: f.handle[:0]}
	if len(msg) < nl.SizeofNfgenmsg {
		return false
	}
	var reply plan.Protocol
	for attrs := attributes(msg[nl.SizeofNfgenmsg:]); attrs.next(); {
		switch attrs.kind {
		case ctaTupleOrig:
			f.client, f.to, f.protocol = parseTuple(attrs.value)
		case ctaTupleReply:
			f.from, f.source, reply = parseTuple(attrs.value)
		case ctaStatus:
			if len(attrs.value) == 4 {
				status := binary.BigEndian.Uint32(attrs.value)
				f.answered, f.assured = status&statusSeenReply != 0, status&statusAssured != 0
			}
		case ctaProtoInfo:
			f.state = stateOf(attrs.value)
		case ctaID:
			if len(attrs.value) == 4 {
				f.id = binary.BigEndian.Uint32(attrs.value)
			}
		}
		switch attrs.kind {
		// The id distinguishes the flow from a later one between the same ports.
		case ctaTupleOrig, ctaZone, ctaID:
			f.handle = append(f.handle, attrs.whole...)
		}
	}
	return f.protocol != 0 && f.protocol == reply && f.to.IsValid() && f.from.IsValid() && f.source.IsValid()
}

func parseTuple(b []byte) (src, dst netip.AddrPort, protocol plan.Protocol) {
	var addrs [2]netip.Addr
	var ports [2]uint16
	for attrs := attributes(b); attrs.next(); {
		switch attrs.kind {
		case ctaTupleIP:
			for ip := attributes(attrs.value); ip.next(); {
				a, _ := netip.AddrFromSlice(ip.value)
				switch ip.kind {
				case ctaIPv4Src, ctaIPv6Src:
					addrs[0] = a
				case ctaIPv4Dst, ctaIPv6Dst:
					addrs[1] = a
				}
			}
		case ctaTupleProto:
			for proto := attributes(attrs.value); proto.next(); {
				switch {
				case proto.kind == ctaProtoNum && len(proto.value) == 1:
					protocol = plan.Protocol(proto.value[0])
				case proto.kind == ctaProtoSrcPort && len(proto.value) == 2:
					ports[0] = binary.BigEndian.Uint16(proto.value)
				case proto.kind == ctaProtoDstPort && len(proto.value) == 2:
					ports[1] = binary.BigEndian.Uint16(proto.value)
				}
			}
		}
	}
	return netip.AddrPortFrom(addrs[0], ports[0]), netip.AddrPortFrom(addrs[1], ports[1]), protocol
}

// attrReader iterates over netlink attributes without allocating.
type attrReader struct {
	rest  []byte
	kind  uint16
	value []byte
	whole []byte // with header and padding
}

func attributes(b []byte) attrReader { return attrReader{rest: b} }

func (r *attrReader) next() bool {
	if len(r.rest) < unix.SizeofNlAttr {
		return false
	}
	length := int(binary.NativeEndian.Uint16(r.rest))
	if length < unix.SizeofNlAttr || length > len(r.rest) {
		return false
	}
	r.kind = binary.NativeEndian.Uint16(r.rest[2:]) & attrTypeMask
	r.value = r.rest[unix.SizeofNlAttr:length]
	aligned := min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(r.rest))
	r.whole, r.rest = r.rest[:aligned], r.rest[aligned:]
	return true
}

// unsupported adds the remedy to the kernel's answer.
func unsupported(err error) error {
	remedy := "the kernel needs CONFIG_NF_CT_NETLINK (module nf_conntrack_netlink)"
	if errors.Is(err, unix.EPERM) {
		remedy = "the process needs CAP_NET_ADMIN"
	}
	return fmt.Errorf("the connection tracking table cannot be read: %w; %s", err, remedy)
}
