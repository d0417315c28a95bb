package kernel

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"time"

	lvs "github.com/moby/ipvs"
	"github.com/sirupsen/logrus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// destination is one of a virtual server's in the kernel.
type Destination struct {
	Addr        netip.AddrPort
	Weight      int
	Connections int // open and recently closed ones
}

// patience is how long one exchange with the kernel may take. The longest is
// the listing of all virtual servers.
const answerTimeout = 30 * time.Second

var errNoAnswer = errors.New("IPVS did not answer in time")

// handle speaks to IPVS of one network namespace. What changes IPVS goes through
// a pipe. What reads it goes through a library that waits for ever for an answer
// that got lost; so that runs on a goroutine which is left to itself after a
// while; closing its socket ends it.
type IPVS struct {
	family plan.Family
	number uint16 // of IPVS in generic netlink
	pipe   *pipe
	lib    *lvs.Handle // nil after an exchange was abandoned
	// listing is nil where the kernel has none.
	listing *os.File
}

// familyName is what generic netlink calls IPVS.
const familyName = "IPVS"

// openKernel connects to the caller's network namespace.
func OpenIPVS(family plan.Family) (*IPVS, error) {
	// The library asks once in a process which number the kernel gave IPVS,
	// and keeps a failure for good; so it is not asked where there is none.
	genl, err := netlink.GenlFamilyGet(familyName)
	if err != nil {
		return nil, err
	}
	p, err := openPipe(unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	h := &IPVS{family: family, number: genl.ID, pipe: p, listing: openListing()}
	if err := h.open(); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

func (h *IPVS) open() (err error) {
	// It warns where there is no modprobe to load what is there already.
	logrus.SetLevel(logrus.PanicLevel)
	namespace := ""
	if h.pipe.ns.IsOpen() {
		namespace = fmt.Sprintf("/proc/self/fd/%d", int(h.pipe.ns))
	}
	h.lib, err = lvs.New(namespace)
	return err
}

func (h *IPVS) Close() {
	if h.lib != nil {
		h.lib.Close()
	}
	if h.listing != nil {
		h.listing.Close()
	}
	h.pipe.close()
}

// exchange runs fn, but not longer than patience.
func (h *IPVS) exchange(fn func(*lvs.Handle) error) error {
	if h.lib == nil {
		if err := h.open(); err != nil {
			return err
		}
	}
	lib, done := h.lib, make(chan error, 1)
	go func() { done <- fn(lib) }()
	late := time.NewTimer(answerTimeout)
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

func (h *IPVS) addressFamily() uint16 {
	if h.family == plan.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// service is what the library asks about a virtual server by.
func (h *IPVS) service(key ServerKey) *lvs.Service {
	s := &lvs.Service{FWMark: key.Mark, AddressFamily: h.addressFamily(), Protocol: uint16(key.Protocol), Port: key.Port}
	if key.Mark == 0 {
		s.Address = net.IP(key.Addr.AsSlice())
	}
	return s
}

// servers lists the virtual servers. The kernel keeps those of all network
// namespaces in one table and resumes a long listing by counting, so that a
// change elsewhere hides some: a listing holds if the next one equals it.
func (h *IPVS) Servers() (map[ServerKey]string, error) {
	last, err := h.listServers()
	for range 5 {
		if err != nil {
			return nil, err
		}
		var again map[ServerKey]string
		again, err = h.listServers()
		if maps.Equal(last, again) {
			break
		}
		last = again
	}
	return last, err
}

func (h *IPVS) listServers() (map[ServerKey]string, error) {
	var list []*lvs.Service
	err := h.exchange(func(lib *lvs.Handle) (err error) {
		list, err = lib.GetServices()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the virtual servers: %w", err)
	}
	servers := make(map[ServerKey]string)
	for _, s := range list {
		if s.AddressFamily != h.addressFamily() {
			continue
		}
		key := ServerKey{Mark: s.FWMark}
		if key.Mark == 0 {
			addr, _ := netip.AddrFromSlice(s.Address)
			key = ServerKey{Addr: addr, Port: s.Port, Protocol: plan.Protocol(s.Protocol)}
		}
		servers[key] = s.SchedName
	}
	return servers, nil
}

func (h *IPVS) Destinations(key ServerKey) ([]Destination, error) {
	s := h.service(key)
	var list []*lvs.Destination
	err := h.exchange(func(lib *lvs.Handle) (err error) {
		list, err = lib.GetDestinations(s)
		return err
	})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("list the destinations of %s: %w", key, err)
	}
	dests := make([]Destination, 0, len(list))
	for _, d := range list {
		addr, _ := netip.AddrFromSlice(d.Address)
		dests = append(dests, Destination{
			Addr: netip.AddrPortFrom(addr, d.Port), Weight: d.Weight, Connections: d.ActiveConnections + d.InactiveConnections,
		})
	}
	return dests, nil
}

// probeMark is in the mode's range of marks, and no packet has it.
const probeMark uint32 = 0x4000_0000

// hasScheduler makes a virtual server for a moment, by a mark that no packet
// has: the kernel tells nobody which schedulers there are.
func (h *IPVS) HasScheduler(name string) (bool, error) {
	probe := Op{Verb: AddServer, Key: ServerKey{Mark: probeMark}, Scheduler: name}
	err := h.do(probe)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EEXIST): // left by a process that was killed
		if err = h.do(Op{Verb: RemoveServer, Key: probe.Key}); err == nil {
			return h.HasScheduler(name)
		}
	}
	if err != nil {
		return false, err
	}
	return true, h.do(Op{Verb: RemoveServer, Key: probe.Key})
}

func (h *IPVS) SetTimeouts(tcp, tcpFin, udp time.Duration) error {
	err := h.exchange(func(lib *lvs.Handle) error {
		return lib.SetConfig(&lvs.Config{TimeoutTCP: tcp, TimeoutTCPFin: tcpFin, TimeoutUDP: udp})
	})
	if err != nil {
		return fmt.Errorf("set the time-outs of IPVS: %w", err)
	}
	return nil
}
