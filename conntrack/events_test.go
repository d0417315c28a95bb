// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// entry is what a message says about a connection.
type entry struct {
	orig, reply [2]netip.AddrPort
	protocol    plan.Protocol
	status      uint32
	protoInfo   uint16 // attribute of the protocol; 0 for none
	state       uint8
}

// message encodes an entry as the kernel does.
func (e *entry) message(t *testing.T, kind netlink.HeaderType, flags netlink.HeaderFlags) netlink.Message {
	t.Helper()
	a := netlink.NewAttributeEncoder()
	a.Nested(ctaTupleOrig, e.tuple(e.orig))
	a.Nested(ctaTupleReply, e.tuple(e.reply))
	a.ByteOrder = binary.BigEndian
	a.Uint32(ctaID, 77)
	a.Uint32(ctaStatus, e.status)
	if e.protoInfo != 0 {
		a.Nested(ctaProtoInfo, func(a *netlink.AttributeEncoder) error {
			a.Nested(e.protoInfo, func(a *netlink.AttributeEncoder) error {
				a.Uint8(ctaProtoInfoState, e.state)
				return nil
			})
			return nil
		})
	}
	data, err := a.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return netlink.Message{Header: netlink.Header{Type: kind, Flags: flags}, Data: append([]byte{unix.AF_INET, 0, 0, 0}, data...)}
}

func (e *entry) tuple(ends [2]netip.AddrPort) func(*netlink.AttributeEncoder) error {
	return func(a *netlink.AttributeEncoder) error {
		src, dst := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
		if ends[0].Addr().Is6() {
			src, dst = ctaIPv6Src, ctaIPv6Dst
		}
		a.Nested(ctaTupleIP, func(a *netlink.AttributeEncoder) error {
			a.Bytes(src, ends[0].Addr().AsSlice())
			a.Bytes(dst, ends[1].Addr().AsSlice())
			return nil
		})
		a.Nested(ctaTupleProto, func(a *netlink.AttributeEncoder) error {
			a.ByteOrder = binary.BigEndian
			a.Uint8(ctaProtoNum, uint8(e.protocol))
			if e.protocol == unix.IPPROTO_ICMP {
				return nil
			}
			a.Uint16(ctaProtoSrcPort, ends[0].Port())
			a.Uint16(ctaProtoDstPort, ends[1].Port())
			return nil
		})
		return nil
	}
}

func TestEvent(t *testing.T) {
	at := netip.MustParseAddrPort
	client, vip, endpoint, node := at("10.244.1.12:4000"), at("10.96.0.10:80"), at("10.244.1.5:8080"), at("192.0.2.1:5000")
	client6, vip6, endpoint6 := at("[fd00::c]:4000"), at("[fd96::10]:80"), at("[fd00::5]:8080")
	tcp := func(status uint32, state uint8) entry {
		return entry{[2]netip.AddrPort{client, vip}, [2]netip.AddrPort{endpoint, node}, plan.TCP, status, ctaProtoInfoTCP, state}
	}
	udp := func(status uint32) entry {
		return entry{[2]netip.AddrPort{client6, vip6}, [2]netip.AddrPort{endpoint6, client6}, plan.UDP, status, 0, 0}
	}
	sctp := func(state uint8) entry {
		return entry{[2]netip.AddrPort{client, vip}, [2]netip.AddrPort{endpoint, client}, plan.SCTP, statusSeenReply, ctaProtoInfoSCTP, state}
	}
	icmp := entry{[2]netip.AddrPort{client, vip}, [2]netip.AddrPort{endpoint, client}, unix.IPPROTO_ICMP, 0, 0, 0}
	const created = netlink.Create | netlink.Excl
	for name, test := range map[string]struct {
		entry entry
		kind  netlink.HeaderType
		flags netlink.HeaderFlags
		want  Step
	}{
		"TCP, first packet":      {tcp(0, 1), msgNew, created, StepNew},
		"TCP, SYN and ACK":       {tcp(statusSeenReply, 2), msgNew, 0, ""},
		"TCP, handshake":         {tcp(statusSeenReply|statusAssured, 3), msgNew, 0, StepAnswered},
		"TCP, another attribute": {tcp(statusSeenReply|statusAssured, 0), msgNew, 0, ""},
		"TCP, FIN":               {tcp(statusSeenReply, 4), msgNew, 0, StepClosing},
		"TCP, second FIN":        {tcp(statusSeenReply, 6), msgNew, 0, ""},
		"TCP, RST":               {tcp(statusSeenReply, 8), msgNew, 0, StepReset},
		"TCP, forgotten":         {tcp(statusSeenReply, 7), msgDelete, 0, StepEnd},
		"UDP, first packet":      {udp(0), msgNew, created, StepNew},
		"UDP, reply":             {udp(statusSeenReply), msgNew, 0, StepAnswered},
		"UDP, more":              {udp(statusSeenReply | statusAssured), msgNew, 0, ""},
		"SCTP, handshake":        {sctp(4), msgNew, 0, StepAnswered},
		"SCTP, shutdown":         {sctp(5), msgNew, 0, StepClosing},
		"SCTP, heartbeat":        {sctp(8), msgNew, 0, ""},
		"ICMP":                   {icmp, msgNew, created, ""},
		"another message":        {tcp(0, 1), msgGetStats, 0, ""},
	} {
		var f flow
		m := test.entry.message(t, test.kind, test.flags)
		got, ok := f.event(m)
		if ok != (test.want != "") || ok && got.Step != test.want {
			t.Errorf("%s: %q, %v, want %q", name, got.Step, ok, test.want)
		}
		e := test.entry
		want := Event{Flow{e.orig[0], e.orig[1], e.reply[0], e.reply[1]}, test.want, plan.FamilyOf(e.orig[0].Addr()), e.protocol, 77}
		if ok && got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
		for n := range m.Data {
			cut := m
			cut.Data = m.Data[:n]
			f.event(cut) // must not panic
		}
	}
}

// The kernel runs the filter: of two flows, one to the port of a Service, only that one
// is reported, with its end. Both families and a translated destination are in it.
func TestFollow(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			w := newWorld(t, family)
			w.rules([2]netip.AddrPort{w.vip, w.a})
			events, err := Follow()
			if err != nil {
				t.Fatal(err)
			}
			defer events.Close()
			if err := events.Begin([]uint16{1, w.vip.Port(), 65535}); err != nil {
				t.Fatal(err)
			}
			w.client(w.foreign).send() // at another port
			c := w.client(w.vip)
			if got := c.ask(); got != "a" {
				t.Fatalf("%s answers", got)
			}
			removeFlows(t, family, w.vip)
			var got []Step
			stop := time.AfterFunc(hangTimeout, func() { events.Close() })
			defer stop.Stop()
			for !slices.Contains(got, StepEnd) {
				err := events.Next(func(e Event) {
					client := netip.AddrPortFrom(w.node, c.port())
					if want := (Flow{client, w.vip, w.a, client}); e.Flow != want || e.Family != family || e.Protocol != plan.UDP || e.ID == 0 {
						t.Errorf("%+v is reported, want %+v", e, want)
					}
					got = append(got, e.Step)
				})
				if err != nil {
					t.Fatalf("%v after %q", err, got)
				}
			}
			if want := []Step{StepNew, StepAnswered, StepEnd}; !slices.Equal(got, want) {
				t.Errorf("the steps are %q, want %q", got, want)
			}
		})
	}
}

func (c *client) port() uint16 { return c.conn.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// removeFlows has the kernel forget the UDP flows to a virtual IP.
func removeFlows(t *testing.T, family plan.Family, to netip.AddrPort) {
	t.Helper()
	table, err := openTable()
	if err != nil {
		t.Fatal(err)
	}
	defer table.close()
	var handles [][]byte
	err = table.each(family, plan.UDP, func(f *flow) {
		if f.to == to {
			handles = append(handles, slices.Clone(f.handle))
		}
	})
	for _, h := range handles {
		err = errors.Join(err, table.remove(family, h))
	}
	if err != nil || len(handles) != 1 {
		t.Fatalf("%d flows to %s are removed, %v", len(handles), to, err)
	}
}

// A socket that overflows says so, and goes on.
func TestEventsLost(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	events, err := Follow()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	if err := events.conn.SetReadBuffer(1); err != nil { // the kernel has a least size
		t.Fatal(err)
	}
	if err := events.Begin([]uint16{w.vip.Port()}); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		w.client(w.vip).send()
	}
	stop := time.AfterFunc(hangTimeout, func() { events.Close() })
	defer stop.Stop()
	reported := 0
	for err == nil {
		err = events.Next(func(Event) { reported++ })
	}
	if !errors.Is(err, ErrEventsLost) {
		t.Fatalf("after %d events: %v", reported, err)
	}
	for err != nil || reported < 200 { // until the buffer is empty and one more has come
		if err = events.Next(func(Event) { reported = 200 }); err != nil && !errors.Is(err, ErrEventsLost) {
			t.Fatal(err)
		}
	}
}

// More ports than the filter can hold are not filtered.
func TestFollowManyPorts(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	events, err := Follow()
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	for _, n := range []uint16{maxFilteredPorts, maxFilteredPorts + 1} {
		ports := make([]uint16, n)
		for i := range ports {
			ports[i] = 40000 + uint16(i)
		}
		if err := events.Begin(ports); err != nil {
			t.Fatalf("%d ports: %v", n, err)
		}
		w.client(w.vip).send()
	}
	stop := time.AfterFunc(hangTimeout, func() { events.Close() })
	defer stop.Stop()
	reported := 0
	if err := events.Next(func(Event) { reported++ }); err != nil || reported != 1 {
		t.Errorf("%d flows are reported, %v", reported, err)
	}
}

func TestNoEvents(t *testing.T) {
	newWorld(t, plan.IPv4)
	if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_events", []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Follow(); !errors.Is(err, ErrNoEvents) {
		t.Errorf("a kernel without events: %v", err)
	}
}
