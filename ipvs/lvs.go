package ipvs

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	lvs "github.com/moby/ipvs"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// destination is one of a virtual server's in the kernel.
type destination struct {
	addr        netip.AddrPort
	weight      int
	connections int // open and recently closed ones
}

// kernel is what the mode needs of IPVS, for one IP family.
type kernel interface {
	// servers lists all virtual servers of the family, others' too.
	servers() (map[serverKey]*server, error)
	dests(serverKey) ([]destination, error)
	// do sends one message. That there is nothing to remove is no error.
	do(op) error
	// hasScheduler says whether the kernel has, or can load, a scheduler.
	hasScheduler(name string) (bool, error)
	setTimeouts(tcp, tcpFin, udp time.Duration) error
	close()
}

// The flags of a virtual server, from <linux/ip_vs.h>.
const (
	// schedulerFallback makes the hashing schedulers pass over a destination
	// of weight 0 instead of refusing its clients.
	schedulerFallback = 1 << 3
	// schedulerPort makes them hash the client's port, too.
	schedulerPort = 1 << 4
)

// patience is how long one exchange with the kernel may take. The longest is
// the listing of all virtual servers.
const patience = 30 * time.Second

var errNoAnswer = errors.New("IPVS did not answer in time")

// handle speaks to IPVS of one network namespace through a library that waits
// for ever for an answer that got lost. So every exchange runs on a goroutine
// that is left to itself after a while; closing its socket ends it.
type handle struct {
	family proxier.Family
	ns     netns.NsHandle
	lib    *lvs.Handle // nil after an exchange was abandoned
}

// familyName is what generic netlink calls IPVS.
const familyName = "IPVS"

// openKernel connects to the caller's network namespace.
func openKernel(family proxier.Family) (*handle, error) {
	// The library asks once in a process which number the kernel gave IPVS,
	// and keeps a failure for good; so it is not asked where there is none.
	if _, err := netlink.GenlFamilyGet(familyName); err != nil {
		return nil, err
	}
	ns, err := netns.Get()
	if err != nil {
		return nil, err
	}
	h := &handle{family: family, ns: ns}
	if err := h.open(); err != nil {
		ns.Close()
		return nil, err
	}
	return h, nil
}

func (h *handle) open() (err error) {
	// It warns where there is no modprobe to load what is there already.
	logrus.SetLevel(logrus.PanicLevel)
	h.lib, err = lvs.New(fmt.Sprintf("/proc/self/fd/%d", int(h.ns)))
	return err
}

func (h *handle) close() {
	if h.lib != nil {
		h.lib.Close()
	}
	h.ns.Close()
}

// exchange runs fn, but not longer than patience.
func (h *handle) exchange(fn func(*lvs.Handle) error) error {
	if h.lib == nil {
		if err := h.open(); err != nil {
			return err
		}
	}
	lib, done := h.lib, make(chan error, 1)
	go func() { done <- fn(lib) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		lib.Close()
		h.lib = nil
		return errNoAnswer
	}
}

func (h *handle) addressFamily() uint16 {
	if h.family == proxier.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (h *handle) service(key serverKey, scheduler string) *lvs.Service {
	s := &lvs.Service{
		FWMark: key.mark, AddressFamily: h.addressFamily(), SchedName: scheduler,
		Protocol: uint16(key.protocol), Port: key.port, Netmask: 0xffffffff,
	}
	if h.family == proxier.IPv6 {
		s.Netmask = 128 // a prefix length here
	}
	if key.mark == 0 {
		s.Address = net.IP(key.addr.AsSlice())
	}
	switch scheduler {
	case "sh":
		s.Flags = schedulerFallback
	case "mh":
		s.Flags = schedulerFallback | schedulerPort
	}
	return s
}

func (h *handle) do(o op) error {
	s := h.service(o.key, o.scheduler)
	d := &lvs.Destination{Weight: o.weight, ConnectionFlags: lvs.ConnectionFlagMasq, AddressFamily: h.addressFamily()}
	if o.dest.IsValid() {
		d.Address, d.Port = net.IP(o.dest.Addr().AsSlice()), o.dest.Port()
	}
	err := h.exchange(func(lib *lvs.Handle) error {
		switch o.verb {
		case addServer:
			return lib.NewService(s)
		case setServer:
			return lib.UpdateService(s)
		case addDest:
			return lib.NewDestination(s, d)
		case setDest:
			return lib.UpdateDestination(s, d)
		case removeDest:
			return lib.DelDestination(s, d)
		}
		return lib.DelService(s)
	})
	gone := o.verb == removeDest || o.verb == removeServer
	if err == nil || gone && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)) {
		return nil
	}
	return fmt.Errorf("ipvsadm %s: %w", o, err)
}

func (h *handle) servers() (map[serverKey]*server, error) {
	var list []*lvs.Service
	err := h.exchange(func(lib *lvs.Handle) (err error) {
		list, err = lib.GetServices()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the virtual servers: %w", err)
	}
	servers := make(map[serverKey]*server)
	for _, s := range list {
		if s.AddressFamily != h.addressFamily() {
			continue
		}
		key := serverKey{mark: s.FWMark}
		if key.mark == 0 {
			addr, _ := netip.AddrFromSlice(s.Address)
			key = serverKey{addr: addr, port: s.Port, protocol: proxier.Protocol(s.Protocol)}
		}
		servers[key] = &server{scheduler: s.SchedName}
	}
	return servers, nil
}

func (h *handle) dests(key serverKey) ([]destination, error) {
	s := h.service(key, "")
	var list []*lvs.Destination
	err := h.exchange(func(lib *lvs.Handle) (err error) {
		list, err = lib.GetDestinations(s)
		return err
	})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("list the destinations of %s: %w", key, err)
	}
	dests := make([]destination, 0, len(list))
	for _, d := range list {
		addr, _ := netip.AddrFromSlice(d.Address)
		dests = append(dests, destination{
			addr: netip.AddrPortFrom(addr, d.Port), weight: d.Weight, connections: d.ActiveConnections + d.InactiveConnections,
		})
	}
	return dests, nil
}

// hasScheduler makes a virtual server for a moment, by a mark that no packet
// has: the kernel tells nobody which schedulers there are.
func (h *handle) hasScheduler(name string) (bool, error) {
	probe := op{verb: addServer, key: serverKey{mark: noEndpoints}, scheduler: name}
	err := h.do(probe)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EEXIST): // left by a process that was killed
		if err = h.do(op{verb: removeServer, key: probe.key}); err == nil {
			return h.hasScheduler(name)
		}
	}
	if err != nil {
		return false, err
	}
	return true, h.do(op{verb: removeServer, key: probe.key})
}

func (h *handle) setTimeouts(tcp, tcpFin, udp time.Duration) error {
	err := h.exchange(func(lib *lvs.Handle) error {
		return lib.SetConfig(&lvs.Config{TimeoutTCP: tcp, TimeoutTCPFin: tcpFin, TimeoutUDP: udp})
	})
	if err != nil {
		return fmt.Errorf("set the time-outs of IPVS: %w", err)
	}
	return nil
}
