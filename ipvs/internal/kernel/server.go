// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"signalbox/proxier/plan"
)

// ServerKey identifies a virtual server: a packet mark, or an address, port and protocol.
type ServerKey struct {
	Mark     uint32
	Addr     netip.Addr
	Port     uint16
	Protocol plan.Protocol // also of a server by mark, for which IPVS has none
}

// String names the server with the option of ipvsadm.
func (k ServerKey) String() string {
	if k.Mark != 0 {
		return fmt.Sprintf("-f %d", k.Mark)
	}
	option := map[plan.Protocol]string{plan.TCP: "-t", plan.UDP: "-u", plan.SCTP: "--sctp-service"}[k.Protocol]
	return option + " " + netip.AddrPortFrom(k.Addr, k.Port).String()
}

// Compare orders servers by mark, address, protocol and port.
func (k ServerKey) Compare(o ServerKey) int {
	return cmp.Or(cmp.Compare(k.Mark, o.Mark), k.Addr.Compare(o.Addr), cmp.Compare(k.Protocol, o.Protocol), cmp.Compare(k.Port, o.Port))
}

// ID is the key in the kernel, which knows no protocol of a server by mark.
func (k ServerKey) ID() ServerKey {
	if k.Mark != 0 {
		return ServerKey{Mark: k.Mark}
	}
	return k
}

// Verb is the command of one message to IPVS.
type Verb uint8

// The commands that change IPVS.
const (
	AddServer Verb = iota
	SetServer
	AddDestination
	SetDestination
	RemoveDestination
	RemoveServer
)

// Op is one message that changes IPVS.
type Op struct {
	Verb        Verb
	Key         ServerKey
	Scheduler   string
	Destination netip.AddrPort
	Weight      int
	Method      Method
}

// Method is how IPVS forwards packets to a destination, as numbered in <linux/ip_vs.h>.
type Method uint8

// Masquerading is the method of signalbox: IPVS rewrites the destination address. Other
// programs may use the others.
const (
	Masquerading Method = iota
	LocalNode
	Tunnel
	DirectRoute
	Bypass
)

// methods have the names of the kernel's listing, and the options of ipvsadm. ipvsadm has no
// option for two of them.
var methods = [...]struct{ name, option string }{
	Masquerading: {"Masq", "-m"}, LocalNode: {"Local", "-Local"}, Tunnel: {"Tunnel", "-i"}, DirectRoute: {"Route", "-g"}, Bypass: {"Bypass", "-Bypass"},
}

// String returns the option of ipvsadm.
func (m Method) String() string {
	if int(m) < len(methods) {
		return methods[m].option
	}
	return fmt.Sprintf("-method-%d", uint8(m))
}

// schedulerText names a scheduler, and the options of ipvsadm that signalbox does not give it.
func schedulerText(name string, flags uint32) string {
	own := flagsOf(name)
	if flags&servicePersistent != 0 {
		name += " -p"
	}
	if flags&serviceOnePacket != 0 {
		name += " -o"
	}
	if foreign := flags & schedulerFlags; foreign != own {
		name += " -b " + strings.Join(schedulerFlagNames(foreign), ",")
	}
	return name
}

// schedulerFlagNames has the names of ipvsadm.
func schedulerFlagNames(flags uint32) []string {
	var names []string
	for i, flag := range []uint32{schedulerFallback, schedulerPort, 1 << 5} {
		if flags&flag != 0 {
			names = append(names, fmt.Sprintf("flag-%d", i+1))
		}
	}
	if len(names) == 0 {
		return []string{"none"}
	}
	return names
}

// String returns the arguments with which ipvsadm does the same.
func (o Op) String() string {
	switch o.Verb {
	case AddServer:
		return fmt.Sprintf("-A %s -s %s", o.Key, o.Scheduler)
	case SetServer:
		return fmt.Sprintf("-E %s -s %s", o.Key, o.Scheduler)
	case AddDestination:
		return fmt.Sprintf("-a %s -r %s %s -w %d", o.Key, o.Destination, o.Method, o.Weight)
	case SetDestination:
		return fmt.Sprintf("-e %s -r %s %s -w %d", o.Key, o.Destination, o.Method, o.Weight)
	case RemoveDestination:
		return fmt.Sprintf("-d %s -r %s", o.Key, o.Destination)
	}
	return fmt.Sprintf("-D %s", o.Key)
}

// OpsText is the input of `ipvsadm --restore`: one message a line.
func OpsText(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}
