// SPDX-License-Identifier: Apache-2.0

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

// Destination is an endpoint of a virtual server.
type Destination struct {
	Addr        netip.AddrPort
	Weight      int
	Method      Method
	Connections int // active and inactive ones
}

// answerTimeout limits one request and its answer. The longest answer lists all virtual
// servers.
const answerTimeout = 30 * time.Second

var errNoAnswer = errors.New("IPVS did not answer in time")

// IPVS is a connection to IPVS of one network namespace and one IP family. It changes IPVS
// through a pipe, and reads through a library. The library waits without a limit for an
// answer that got lost, so each of its calls has a goroutine of its own.
type IPVS struct {
	family plan.Family
	number uint16 // of IPVS in generic netlink
	pipe   *pipe
	lib    *lvs.Handle // nil after a call that timed out
	// listing is listingFile, or nil if the kernel lacks it.
	listing *os.File
}

// familyName is the name of IPVS in generic netlink.
const familyName = "IPVS"

// OpenIPVS connects to the caller's network namespace.
func OpenIPVS(family plan.Family) (*IPVS, error) {
	// The library asks for the number of IPVS once in a process, and keeps a failure
	// forever. So the library is used only if IPVS is there.
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
	// The library warns if it finds no modprobe, although the module is loaded.
	logrus.SetLevel(logrus.PanicLevel)
	namespace := ""
	if h.pipe.ns.IsOpen() {
		namespace = fmt.Sprintf("/proc/self/fd/%d", int(h.pipe.ns))
	}
	h.lib, err = lvs.New(namespace)
	return err
}

// Close closes the connection.
func (h *IPVS) Close() {
	if h.lib != nil {
		h.lib.Close()
	}
	if h.listing != nil {
		h.listing.Close()
	}
	h.pipe.close()
}

// call runs fn for at most answerTimeout. To close the socket ends a call that takes longer.
func (h *IPVS) call(fn func(*lvs.Handle) error) error {
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

// service is the key in the form of the library.
func (h *IPVS) service(key ServerKey) *lvs.Service {
	s := &lvs.Service{FWMark: key.Mark, AddressFamily: h.addressFamily(), Protocol: uint16(key.Protocol), Port: key.Port}
	if key.Mark == 0 {
		s.Address = net.IP(key.Addr.AsSlice())
	}
	return s
}

// Servers lists the virtual servers of the family, also those of other software, with their
// schedulers. If a virtual server has options that signalbox does not use, its scheduler is
// followed by the options of ipvsadm: "rr -p". The kernel keeps the servers of all network namespaces in one table and
// resumes a long listing by counting. A change in another namespace then hides some servers.
// So Servers lists them again until two listings are equal.
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
	err := h.call(func(lib *lvs.Handle) (err error) {
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
		servers[key] = schedulerText(s.SchedName, s.Flags)
	}
	return servers, nil
}

// Destinations lists the destinations of a virtual server; none if there is no such server.
func (h *IPVS) Destinations(key ServerKey) ([]Destination, error) {
	s := h.service(key)
	var list []*lvs.Destination
	err := h.call(func(lib *lvs.Handle) (err error) {
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
			Addr: netip.AddrPortFrom(addr, d.Port), Weight: d.Weight, Method: Method(d.ConnectionFlags & lvs.ConnectionFlagFwdMask),
			Connections: d.ActiveConnections + d.InactiveConnections,
		})
	}
	return dests, nil
}

// ProbeMark is in the mode's range of marks, and stands for no virtual server.
const ProbeMark uint32 = 0x4000_0000

// HasScheduler says whether the kernel has, or can load, a scheduler. The kernel does not list
// its schedulers, so HasScheduler adds a virtual server by ProbeMark and removes it.
func (h *IPVS) HasScheduler(name string) (bool, error) {
	probe := Op{Verb: AddServer, Key: ServerKey{Mark: ProbeMark}, Scheduler: name}
	err := h.do(probe)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EEXIST): // of a process that was killed
		if err = h.do(Op{Verb: RemoveServer, Key: probe.Key}); err == nil {
			return h.HasScheduler(name)
		}
	}
	if err != nil {
		return false, err
	}
	return true, h.do(Op{Verb: RemoveServer, Key: probe.Key})
}

// SetTimeouts sets how long IPVS remembers idle connections. 0 keeps the value.
func (h *IPVS) SetTimeouts(tcp, tcpFin, udp time.Duration) error {
	err := h.call(func(lib *lvs.Handle) error {
		return lib.SetConfig(&lvs.Config{TimeoutTCP: tcp, TimeoutTCPFin: tcpFin, TimeoutUDP: udp})
	})
	if err != nil {
		return fmt.Errorf("set the timeouts of IPVS: %w", err)
	}
	return nil
}
