// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// hangTimeout ends a test that hangs and decides nothing else.
const hangTimeout = 30 * time.Second

// world is a node without Pods: a network namespace of the test's own, with
// endpoints and clients in it.
type world struct {
	t      testing.TB
	family plan.Family
	plan   *plan.Plan
	p      *Proxier
}

// newWorld makes a world and a Proxier in it. The test's thread is in the
// namespace, and ends with the test's goroutine.
func newWorld(t testing.TB, f plan.Family) *world {
	t.Helper()
	if os.Getenv(inOwnProcess) == "" {
		nstest.Enter(t)
	}
	w := &world{t: t, family: f, plan: &plan.Plan{
		Family: f, Node: plan.Node{NodePortAddrs: plan.NodePortAddrs{All: true}},
		Services: map[plan.ServicePortName]*plan.ServicePort{},
	}}
	lo, err := netlink.LinkByName("lo")
	w.must(err)
	w.must(netlink.LinkSetUp(lo))
	for n := range 4 {
		w.must(netlink.AddrReplace(lo, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(w.endpoint(n).Addr(), f.HostBits())), Flags: unix.IFA_F_NODAD}))
	}
	// The kernel makes an IPv6 address one of the node's a moment later.
	for n := range 4 {
		w.await("an address of the node", func() bool {
			found, err := netlink.RouteGet(w.endpoint(n).Addr().AsSlice())
			return err == nil && found[0].Type == unix.RTN_LOCAL
		})
	}
	// Something must route virtual addresses before their packets are redirected.
	w.must(netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(netip.PrefixFrom(w.vip(0).Addr(), f.HostBits()-8))}))
	w.p = w.proxier()
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) proxier() *Proxier {
	w.t.Helper()
	p, err := New(proxier.Options{Family: w.family, MasqueradeMark: proxier.DefaultMasqueradeMark})
	w.must(err)
	w.t.Cleanup(func() { p.Close() })
	return p
}

func eachFamily(t *testing.T, test func(t *testing.T, w *world)) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) { test(t, newWorld(t, f)) })
	}
}

// endpoint is the address and port of endpoint number n.
func (w *world) endpoint(n int) netip.AddrPort {
	if w.family == plan.IPv6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[fd00:1::%x]:8080", n+1))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("10.1.0.%d:8080", n+1))
}

// vip is a virtual address and port.
func (w *world) vip(n int) netip.AddrPort {
	if w.family == plan.IPv6 {
		return netip.MustParseAddrPort(fmt.Sprintf("[fd00:96::%02x]:80", n))
	}
	return netip.MustParseAddrPort(fmt.Sprintf("10.96.0.%d:80", n))
}

func (w *world) set(endpoints ...int) *plan.EndpointSet {
	s := &plan.EndpointSet{}
	for _, n := range endpoints {
		s.Endpoints = append(s.Endpoints, plan.Endpoint{AddrPort: w.endpoint(n)})
	}
	return s
}

// serve makes endpoints serve virtual address n, over both protocols.
func (w *world) serve(n int, affinity time.Duration, endpoints ...int) {
	w.t.Helper()
	var changed []plan.ServicePortName
	for _, p := range []plan.Protocol{plan.TCP, plan.UDP} {
		name := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "test", Name: fmt.Sprint("web", n)}, Protocol: p}
		set := w.set(endpoints...)
		w.plan.Services[name] = &plan.ServicePort{
			Name: name, AffinityTimeout: affinity, Usable: set,
			Frontends: []plan.Frontend{{Addr: w.vip(n).Addr(), Port: w.vip(n).Port(), Internal: set, External: set, Masquerade: plan.AnySource}},
		}
		changed = append(changed, name)
	}
	w.sync(changed...)
}

// remove deletes the Service of virtual address n.
func (w *world) remove(n int) {
	w.t.Helper()
	var changed []plan.ServicePortName
	for name := range w.plan.Services {
		if name.Name == fmt.Sprint("web", n) {
			delete(w.plan.Services, name)
			changed = append(changed, name)
		}
	}
	w.sync(changed...)
}

func (w *world) sync(changed ...plan.ServicePortName) {
	w.t.Helper()
	w.must(w.p.Sync(w.t.Context(), w.plan, plan.Change{Services: changed}))
}

// listen makes endpoint n hand its connections to handle.
func (w *world) listen(n int, handle func(*net.TCPConn)) {
	w.t.Helper()
	l, err := net.Listen("tcp", w.endpoint(n).String())
	w.must(err)
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			switch {
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil: // no descriptor is left
				runtime.Gosched()
				continue
			}
			go handle(c.(*net.TCPConn))
		}
	}()
}

// echo makes endpoint n say its number, and then whatever it is told.
func (w *world) echo(endpoints ...int) {
	w.t.Helper()
	for _, n := range endpoints {
		w.listen(n, func(c *net.TCPConn) {
			fmt.Fprintln(c, n)
			io.Copy(c, c)
			c.Close()
		})
	}
}

// echoUDP makes endpoints answer each datagram with their number.
func (w *world) echoUDP(endpoints ...int) {
	w.t.Helper()
	for _, n := range endpoints {
		c, err := net.ListenPacket("udp", w.endpoint(n).String())
		w.must(err)
		w.t.Cleanup(func() { c.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				_, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				c.WriteTo([]byte(fmt.Sprint(n)), from)
			}
		}()
	}
}

// client is an open connection to a virtual address.
type client struct {
	t testing.TB
	*net.TCPConn
	in     *bufio.Reader
	server string // who said its number
}

// connect connects to virtual address n.
func (w *world) connect(n int) *client {
	w.t.Helper()
	c := w.dial(n)
	w.must(c.greeted())
	return c
}

// mustReset connects to virtual address n and expects a reset, which can come
// before or after the connection counts as made.
func (w *world) mustReset(n int) {
	w.t.Helper()
	c, err := net.DialTimeout("tcp", w.vip(n).String(), hangTimeout)
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(hangTimeout))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		w.t.Errorf("got %v, want a reset", err)
	}
}

// dial is connect without waiting for the endpoint's number.
func (w *world) dial(n int) *client {
	w.t.Helper()
	conn, err := net.DialTimeout("tcp", w.vip(n).String(), hangTimeout)
	w.must(err)
	w.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(hangTimeout))
	return &client{t: w.t, TCPConn: conn.(*net.TCPConn), in: bufio.NewReader(conn)}
}

func (c *client) greeted() (err error) {
	c.server, err = c.in.ReadString('\n')
	return err
}

// ask says something and expects to hear it.
func (c *client) ask(text string) {
	c.t.Helper()
	if _, err := fmt.Fprintln(c, text); err != nil {
		c.t.Fatal(err)
	}
	if got, err := c.in.ReadString('\n'); err != nil || got != text+"\n" {
		c.t.Fatalf("got %q and error %v, want %q", got, err, text)
	}
}

// askUDP sends a datagram until it is answered, and returns the answer.
func (w *world) askUDP(c net.Conn) string {
	w.t.Helper()
	b := make([]byte, 2048)
	for deadline := time.Now().Add(hangTimeout); time.Now().Before(deadline); {
		if _, err := c.Write([]byte("?")); err != nil {
			continue // a datagram before was refused
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := c.Read(b); err == nil {
			return string(b[:n])
		}
	}
	w.t.Fatal("no answer")
	return ""
}

func (w *world) dialUDP(n int) net.Conn {
	w.t.Helper()
	c, err := net.Dial("udp", w.vip(n).String())
	w.must(err)
	w.t.Cleanup(func() { c.Close() })
	return c
}

// await waits until something has come true.
func (w *world) await(what string, done func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(hangTimeout); !done(); runtime.Gosched() {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s never came true", what)
		}
	}
}

// fullPipes counts the pipes of this process that hold bytes.
func fullPipes(t testing.TB) (n int) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || !strings.HasPrefix(link, "pipe:") {
			continue
		}
		fd, _ := strconv.Atoi(e.Name())
		if held, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil && held > 0 {
			n++
		}
	}
	return n
}
