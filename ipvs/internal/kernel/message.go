// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// Commands, attributes and flags of <linux/ip_vs.h>.
const (
	genlVersion = 1

	cmdNewService = 1
	cmdSetService = 2
	cmdDelService = 3
	cmdNewDest    = 5
	cmdSetDest    = 6
	cmdDelDest    = 7

	attrService = 1
	attrDest    = 2

	serviceFamily    = 1
	serviceProtocol  = 2
	serviceAddr      = 3
	servicePort      = 4
	serviceMark      = 5
	serviceScheduler = 6
	serviceFlags     = 7
	serviceTimeout   = 8
	serviceNetmask   = 9

	destAddr           = 1
	destPort           = 2
	destMethod         = 3
	destWeight         = 4
	destUpperThreshold = 5
	destLowerThreshold = 6

	servicePersistent = 1 << 0
	serviceOnePacket  = 1 << 2

	// schedulerFallback makes the hashing schedulers skip a destination of weight 0.
	// Without it they refuse its clients.
	schedulerFallback = 1 << 3
	// schedulerPort adds the client's port to the hash.
	schedulerPort = 1 << 4
	// schedulerFlags are all flags of schedulers.
	schedulerFlags = schedulerFallback | schedulerPort | 1<<5
	allFlags       = ^uint32(0)
)

var commands = map[Verb]uint8{
	AddServer: cmdNewService, SetServer: cmdSetService, RemoveServer: cmdDelService,
	AddDestination: cmdNewDest, SetDestination: cmdSetDest, RemoveDestination: cmdDelDest,
}

// Send sends messages in order and calls done for each that the kernel has executed. After a
// refusal, Send finishes the window and stops. To remove a missing object is a success.
func (h *IPVS) Send(ops []Op, done func(Op)) error {
	request := func(i int) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(h.number)}, Data: h.encode(&ops[i])}
	}
	var refused []error
	err := h.pipe.send(len(ops), request, func(i int, err error) bool {
		gone := ops[i].Verb == RemoveDestination || ops[i].Verb == RemoveServer
		if err == nil || gone && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)) {
			done(ops[i])
		} else {
			refused = append(refused, fmt.Errorf("ipvsadm %s: %w", ops[i], err))
		}
		return len(refused) == 0
	})
	if err != nil {
		refused = append(refused, fmt.Errorf("write to IPVS: %w", err))
	}
	return summary(refused)
}

// maxRefusals limits the errors in one message: if a virtual server is refused, so are all of
// its destinations.
const maxRefusals = 3

func summary(refused []error) error {
	if more := len(refused) - maxRefusals; more > 0 {
		refused = append(refused[:maxRefusals], fmt.Errorf("and %d more", more))
	}
	return errors.Join(refused...)
}

func (h *IPVS) do(o Op) error { return h.Send([]Op{o}, func(Op) {}) }

// encode returns the message of generic netlink.
func (h *IPVS) encode(o *Op) []byte {
	a := attributes(make([]byte, 0, 160))
	a = append(a, commands[o.Verb], genlVersion, 0, 0)
	a.nested(attrService, func(a *attributes) { h.encodeService(a, o) })
	if o.Destination.IsValid() {
		a.nested(attrDest, func(a *attributes) { encodeDest(a, o) })
	}
	return a
}

func (h *IPVS) encodeService(a *attributes, o *Op) {
	a.uint16(serviceFamily, h.addressFamily())
	if o.Key.Mark != 0 {
		a.uint32(serviceMark, o.Key.Mark)
	} else {
		a.uint16(serviceProtocol, uint16(o.Key.Protocol))
		a.bytes(serviceAddr, o.Key.Addr.AsSlice())
		a.bytes(servicePort, bigEndian(o.Key.Port))
	}
	if o.Verb != AddServer && o.Verb != SetServer {
		return
	}
	a.text(serviceScheduler, o.Scheduler)
	a.bytes(serviceFlags, binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, flagsOf(o.Scheduler)), allFlags))
	a.uint32(serviceTimeout, 0) // only for persistence
	a.uint32(serviceNetmask, h.netmask())
}

func flagsOf(scheduler string) uint32 {
	switch scheduler {
	case "sh":
		return schedulerFallback
	case "mh":
		return schedulerFallback | schedulerPort
	}
	return 0
}

// netmask is the mask of one client: a prefix length for IPv6.
func (h *IPVS) netmask() uint32 {
	if h.family == plan.IPv6 {
		return 128
	}
	return 0xffffffff
}

func encodeDest(a *attributes, o *Op) {
	a.bytes(destAddr, o.Destination.Addr().AsSlice())
	a.bytes(destPort, bigEndian(o.Destination.Port()))
	if o.Verb == RemoveDestination {
		return
	}
	a.uint32(destMethod, uint32(o.Method))
	a.uint32(destWeight, uint32(o.Weight))
	a.uint32(destUpperThreshold, 0)
	a.uint32(destLowerThreshold, 0)
}

func bigEndian(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

// addressRequests add or remove addresses of a device.
func addressRequests(verb uint16, device int, addrs []netip.Addr) func(i int) netlink.Message {
	var flags netlink.HeaderFlags
	if verb == unix.RTM_NEWADDR {
		flags = netlink.Create | netlink.Excl
	}
	return func(i int) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(verb), Flags: flags}, Data: encodeAddress(device, addrs[i])}
	}
}

func encodeAddress(device int, addr netip.Addr) []byte {
	family, flags := byte(unix.AF_INET), byte(0)
	if addr.Is6() {
		family, flags = unix.AF_INET6, unix.IFA_F_NODAD // other nodes have the address, too
	}
	a := attributes{family, byte(addr.BitLen()), flags, unix.RT_SCOPE_UNIVERSE}
	a = binary.NativeEndian.AppendUint32(a, uint32(device))
	a.bytes(unix.IFA_LOCAL, addr.AsSlice())
	a.bytes(unix.IFA_ADDRESS, addr.AsSlice())
	return a
}
