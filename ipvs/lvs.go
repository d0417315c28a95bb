package ipvs

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
	// allDests returns those of all virtual servers at once, as far as that can
	// be had.
	allDests() (map[serverKey][]destination, error)
	// send sends messages in order and tells done of each that the kernel has
	// followed. After one that it refuses only those go on that are on their
	// way. That there is nothing to remove is no refusal.
	send(ops []op, done func(op)) error
	// hasScheduler says whether the kernel has, or can load, a scheduler.
	hasScheduler(name string) (bool, error)
	setTimeouts(tcp, tcpFin, udp time.Duration) error
	close()
}

// patience is how long one exchange with the kernel may take. The longest is
// the listing of all virtual servers.
const patience = 30 * time.Second

var errNoAnswer = errors.New("IPVS did not answer in time")

// handle speaks to IPVS of one network namespace. What changes IPVS goes through
// a pipe. What reads it goes through a library that waits for ever for an answer
// that got lost; so that runs on a goroutine which is left to itself after a
// while; closing its socket ends it.
type handle struct {
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
func openKernel(family plan.Family) (*handle, error) {
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
	h := &handle{family: family, number: genl.ID, pipe: p, listing: openListing()}
	if err := h.open(); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func (h *handle) open() (err error) {
	// It warns where there is no modprobe to load what is there already.
	logrus.SetLevel(logrus.PanicLevel)
	namespace := ""
	if h.pipe.ns.IsOpen() {
		namespace = fmt.Sprintf("/proc/self/fd/%d", int(h.pipe.ns))
	}
	h.lib, err = lvs.New(namespace)
	return err
}

func (h *handle) close() {
	if h.lib != nil {
		h.lib.Close()
	}
	if h.listing != nil {
		h.listing.Close()
	}
	h.pipe.close()
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
	if h.family == plan.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// service is what the library asks about a virtual server by.
func (h *handle) service(key serverKey) *lvs.Service {
	s := &lvs.Service{FWMark: key.mark, AddressFamily: h.addressFamily(), Protocol: uint16(key.protocol), Port: key.port}
	if key.mark == 0 {
		s.Address = net.IP(key.addr.AsSlice())
	}
	return s
}

// servers lists the virtual servers. The kernel keeps those of all network
// namespaces in one table and resumes a long listing by counting, so that a
// change elsewhere hides some: a listing holds if the next one equals it.
func (h *handle) servers() (map[serverKey]*server, error) {
	last, err := h.listServers()
	for range 5 {
		if err != nil {
			return nil, err
		}
		var again map[serverKey]*server
		again, err = h.listServers()
		if maps.EqualFunc(last, again, func(a, b *server) bool { return a.scheduler == b.scheduler }) {
			break
		}
		last = again
	}
	return last, err
}

func (h *handle) listServers() (map[serverKey]*server, error) {
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
			key = serverKey{addr: addr, port: s.Port, protocol: plan.Protocol(s.Protocol)}
		}
		servers[key] = &server{scheduler: s.SchedName}
	}
	return servers, nil
}

func (h *handle) dests(key serverKey) ([]destination, error) {
	s := h.service(key)
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
	err := do(h, probe)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EEXIST): // left by a process that was killed
		if err = do(h, op{verb: removeServer, key: probe.key}); err == nil {
			return h.hasScheduler(name)
		}
	}
	if err != nil {
		return false, err
	}
	return true, do(h, op{verb: removeServer, key: probe.key})
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
