// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"signalbox/node"
	"signalbox/proxier/plan"
)

// Step is what happened to a tracked connection.
type Step string

// The steps. The kernel reports others, such as each state of TCP, which are left out.
const (
	StepOpen     Step = "open"     // it was there before anybody followed it
	StepNew      Step = "new"      // its first packet has left the node, or has reached a socket
	StepAnswered Step = "answered" // both sides have sent; TCP and SCTP have their handshake behind them
	StepClosing  Step = "closing"  // one side has ended it
	StepReset    Step = "reset"    // one side has reset it (TCP)
	StepEnd      Step = "end"      // the kernel has forgotten it
)

// Event is a step of a tracked connection.
type Event struct {
	Flow
	Step     Step
	Family   plan.Family
	Protocol plan.Protocol
	// ID distinguishes the connection from others between the same ports.
	ID uint32
}

// ErrEventsLost says that the kernel had more events than the socket could hold.
var ErrEventsLost = errors.New("events of tracked connections are lost")

// ErrNoEvents says that the kernel reports no events in this network namespace.
var ErrNoEvents = errors.New("the kernel reports no events of tracked connections, because net.netfilter.nf_conntrack_events is 0; set it to 1 or 2")

// Events follows the tracked connections of a network namespace. One goroutine at a time
// calls Next; Begin and Close may be called meanwhile.
type Events struct{ conn *netlink.Conn }

// eventsBuffer is the size of the socket's buffer, about 4,000 events.
const eventsBuffer = 4 << 20

// Follow returns the events of the calling thread's network namespace.
func Follow() (*Events, error) {
	if value, _ := node.Sysctl("net/netfilter/nf_conntrack_events"); value == "0" {
		return nil, ErrNoEvents
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, unsupported(err)
	}
	_ = conn.SetReadBuffer(eventsBuffer) // with the default size, events are lost earlier
	return &Events{conn}, nil
}

// Close ends Next.
func (e *Events) Close() error { return e.conn.Close() }

// Begin reports from now on the connections to these ports. The kernel drops all other
// events before they take space in the socket.
func (e *Events) Begin(ports []uint16) error {
	raw, err := bpf.Assemble(portFilter(ports))
	if err != nil {
		return fmt.Errorf("assemble the filter of events: %w", err)
	}
	if err := e.conn.SetBPF(raw); err != nil {
		return fmt.Errorf("set the filter of events: %w", err)
	}
	for _, group := range []uint32{unix.NFNLGRP_CONNTRACK_NEW, unix.NFNLGRP_CONNTRACK_UPDATE, unix.NFNLGRP_CONNTRACK_DESTROY} {
		if err := e.conn.JoinGroup(group); err != nil {
			return unsupported(err)
		}
	}
	return nil
}

// maxFilteredPorts bounds the filter: the kernel takes 4,096 instructions.
const maxFilteredPorts = 1000

// portFilter accepts events whose original destination has one of the ports. With more
// ports than the filter can hold, it accepts all.
func portFilter(ports []uint16) []bpf.Instruction {
	accept, drop := bpf.RetConstant{Val: 1 << 31}, bpf.RetConstant{Val: 0}
	if len(ports) > maxFilteredPorts {
		return []bpf.Instruction{accept}
	}
	program := []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: unix.SizeofNlMsghdr + nl.SizeofNfgenmsg},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleOrig},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleProto},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaProtoDstPort},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 1}, // ICMP has no ports
		drop,
		bpf.TAX{},
		bpf.LoadIndirect{Off: unix.SizeofNlAttr, Size: 2},
	}
	for _, port := range ports {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(port), SkipTrue: 1}, accept)
	}
	return append(program, drop)
}

// Next waits for events and calls fn with each. It returns after one or more, or with
// ErrEventsLost, after which it may be called again, or when Close is called.
func (e *Events) Next(fn func(Event)) error {
	messages, err := e.conn.Receive()
	if errors.Is(err, unix.ENOBUFS) {
		return ErrEventsLost
	}
	if err != nil {
		return fmt.Errorf("receive events of tracked connections: %w", err)
	}
	var f flow
	for _, m := range messages {
		if event, ok := f.event(m); ok {
			fn(event)
		}
	}
	return nil
}

// event reads a message. It returns false for a step that nobody asks for.
func (f *flow) event(m netlink.Message) (Event, bool) {
	if !f.parse(m.Data) || f.to.Port() == 0 { // ICMP has no ports
		return Event{}, false
	}
	var step Step
	switch {
	case m.Header.Type == msgDelete:
		step = StepEnd
	case m.Header.Type != msgNew:
	case m.Header.Flags&(netlink.Create|netlink.Excl) != 0:
		step = StepNew
	default:
		step = f.step()
	}
	return f.as(step), step != ""
}

func (f *flow) as(step Step) Event {
	return Event{
		Flow: Flow{Client: f.client, Frontend: f.to, Endpoint: f.from, Source: f.source},
		Step: step, Family: plan.FamilyOf(f.to.Addr()), Protocol: f.protocol, ID: f.id,
	}
}

// States of <linux/netfilter/nf_conntrack_tcp.h> and
// <linux/netfilter/nf_conntrack_sctp.h>.
const (
	tcpEstablished = 3
	tcpFinWait     = 4
	tcpClose       = 8

	sctpEstablished      = 4
	sctpShutdownSent     = 5
	sctpShutdownReceived = 6
)

// step says what an update of a connection means.
func (f *flow) step() Step {
	switch f.protocol {
	case plan.TCP:
		return map[uint8]Step{tcpEstablished: StepAnswered, tcpFinWait: StepClosing, tcpClose: StepReset}[f.state]
	case plan.SCTP:
		return map[uint8]Step{sctpEstablished: StepAnswered, sctpShutdownSent: StepClosing, sctpShutdownReceived: StepClosing}[f.state]
	}
	if f.answered && !f.assured { // later updates of UDP say the same again
		return StepAnswered
	}
	return ""
}

// stateOf reads the state out of the attribute CTA_PROTOINFO; 0 if it has none.
func stateOf(b []byte) uint8 {
	for protocols := attributes(b); protocols.next(); {
		if protocols.kind != ctaProtoInfoTCP && protocols.kind != ctaProtoInfoSCTP {
			continue
		}
		for info := attributes(protocols.value); info.next(); {
			if info.kind == ctaProtoInfoState && len(info.value) == 1 {
				return info.value[0]
			}
		}
	}
	return 0
}
