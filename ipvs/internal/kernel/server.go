package kernel

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"signalbox/proxier/plan"
)

// serverKey is what IPVS tells a virtual server by: a mark, or an address, port
// and protocol.
type ServerKey struct {
	Mark     uint32
	Addr     netip.Addr
	Port     uint16
	Protocol plan.Protocol // of a marked server too, where IPVS has none
}

// String is the server as ipvsadm names it.
func (k ServerKey) String() string {
	if k.Mark != 0 {
		return fmt.Sprintf("-f %d", k.Mark)
	}
	option := map[plan.Protocol]string{plan.TCP: "-t", plan.UDP: "-u", plan.SCTP: "--sctp-service"}[k.Protocol]
	return option + " " + netip.AddrPortFrom(k.Addr, k.Port).String()
}

func (k ServerKey) Compare(o ServerKey) int {
	return cmp.Or(cmp.Compare(k.Mark, o.Mark), k.Addr.Compare(o.Addr), cmp.Compare(k.Protocol, o.Protocol), cmp.Compare(k.Port, o.Port))
}

// id is the key as the kernel has it.
func (k ServerKey) ID() ServerKey {
	if k.Mark != 0 {
		return ServerKey{Mark: k.Mark}
	}
	return k
}

// verb is what one message to IPVS asks for.
type Verb uint8

const (
	AddServer Verb = iota
	SetServer
	AddDestination
	SetDestination
	RemoveDestination
	RemoveServer
)

// op is one message to IPVS.
type Op struct {
	Verb        Verb
	Key         ServerKey
	Scheduler   string
	Destination netip.AddrPort
	Weight      int
}

// String is the op as the arguments of ipvsadm.
func (o Op) String() string {
	switch o.Verb {
	case AddServer:
		return fmt.Sprintf("-A %s -s %s", o.Key, o.Scheduler)
	case SetServer:
		return fmt.Sprintf("-E %s -s %s", o.Key, o.Scheduler)
	case AddDestination:
		return fmt.Sprintf("-a %s -r %s -m -w %d", o.Key, o.Destination, o.Weight)
	case SetDestination:
		return fmt.Sprintf("-e %s -r %s -m -w %d", o.Key, o.Destination, o.Weight)
	case RemoveDestination:
		return fmt.Sprintf("-d %s -r %s", o.Key, o.Destination)
	}
	return fmt.Sprintf("-D %s", o.Key)
}

// opsText prints messages, one a line, as `ipvsadm --restore` reads them.
func OpsText(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}
