// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/netlab"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// world is Services at work on a host of a lab of their own.
type world struct {
	*testing.T
	*Services
	host     *netlab.Host
	healthy  atomic.Bool
	failures chan string
	states   chan [2]int    // Services and failures of IPv4
	ticks    chan time.Time // each has those that failed try to listen again
	stop     func()
}

func newWorld(t *testing.T, change ...func(*ServiceOptions)) *world {
	t.Helper()
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lab.Close() })
	w := &world{T: t, host: lab.Host("node1"), failures: make(chan string, 100), states: make(chan [2]int, 1000), ticks: make(chan time.Time)}
	w.healthy.Store(true)
	opts := ServiceOptions{
		Healthy: w.healthy.Load,
		Failed: func(name plan.ServiceName, port uint16, err error) {
			w.failures <- fmt.Sprintf("%s %d %v", name, port, errors.Is(err, syscall.EADDRINUSE))
		},
		State: func(f plan.Family, services, failing int) {
			if f == plan.IPv4 {
				w.states <- [2]int{services, failing}
			}
		},
		Log:    slog.New(slog.DiscardHandler),
		Listen: w.host.Listen,
	}
	for _, c := range change {
		c(&opts)
	}
	w.Services = NewServices(opts)
	w.retry = w.ticks
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Services.Run(ctx)
	}()
	w.stop = func() { cancel(); <-done }
	t.Cleanup(func() { w.stop() })
	return w
}

// tell gives a family its plan.
func (w *world) tell(family plan.Family, addrs plan.NodePortAddrs, checks map[plan.ServiceName]plan.HealthCheck) {
	w.Helper()
	w.Services.Synced(syncer.SyncReport{Family: family, Current: true, NodePortAddrs: addrs, HealthChecks: checks})
}

// awaitState waits until so many Services of IPv4 have a check, and so many
// sockets of both families fail.
func (w *world) awaitState(services, failing int) {
	w.Helper()
	for last := [2]int{-1, -1}; last != [2]int{services, failing}; {
		select {
		case last = <-w.states:
		case <-time.After(time.Minute):
			w.Fatalf("the state is %v, want %d Services and %d that fail", last, services, failing)
		}
	}
}

var all = plan.NodePortAddrs{All: true}

type checks = map[plan.ServiceName]plan.HealthCheck

var web, db = plan.ServiceName{Namespace: "default", Name: "web"}, plan.ServiceName{Namespace: "default", Name: "db"}

// ask returns status, weight and body, or what kept the answer away.
func (w *world) ask(addr netip.Addr, port uint16, path string) (status int, weight, body string, err error) {
	client := w.host.Client()
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + netip.AddrPortFrom(addr, port).String() + path)
	if err != nil {
		return 0, "", "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header.Get("X-Load-Balancing-Endpoint-Weight"), string(text), err
}

func (w *world) want(addr netip.Addr, port uint16, status int, weight string) {
	w.Helper()
	w.eventually(func() error {
		got, gotWeight, body, err := w.ask(addr, port, "/")
		if err != nil || got != status || gotWeight != weight {
			return fmt.Errorf("%s port %d: %d, weight %q (%v: %s), want %d, weight %q", addr, port, got, gotWeight, err, body, status, weight)
		}
		return nil
	})
}

// eventually waits until check has nothing to say any more.
func (w *world) eventually(check func() error) {
	w.Helper()
	end := time.Now().Add(time.Minute)
	for err := check(); err != nil; err = check() {
		if time.Now().After(end) {
			w.Fatal(err)
		}
	}
}

func (w *world) wantClosed(addr netip.Addr, port uint16) {
	w.Helper()
	w.eventually(func() error {
		if _, _, body, err := w.ask(addr, port, "/"); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%s port %d: %v, %s, want a closed port", addr, port, err, body)
		}
		return nil
	})
}

func TestServiceAnswers(t *testing.T) {
	w := newWorld(t)
	v4, v6 := w.host.Addr.V4, w.host.Addr.V6
	w.tell(plan.IPv6, all, checks{web: {Port: 31000, LocalEndpoints: 0}})
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 2}})
	w.awaitState(1, 0)
	// Each family has the port, and a count of its own.
	w.want(v4, 31000, 200, "2")
	w.want(netip.MustParseAddr("127.0.0.1"), 31000, 200, "2")
	w.want(v6, 31000, 503, "0")

	_, _, body, err := w.ask(v4, 31000, "/some/path?x=y")
	want := "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
	if err != nil || body != want {
		t.Errorf("%v: %s", err, cmp.Diff(want, body))
	}
	w.healthy.Store(false)
	w.want(v4, 31000, 503, "2")
	w.healthy.Store(true)

	// A new count needs no new socket.
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 1}})
	w.awaitState(1, 0)
	w.want(v4, 31000, 200, "1")
	// Nothing about health checks is no news about them.
	w.tell(plan.IPv4, all, nil)
	w.want(v4, 31000, 200, "1")

	// Ports change, and change hands.
	w.tell(plan.IPv4, all, checks{web: {Port: 31001, LocalEndpoints: 1}, db: {Port: 31000, LocalEndpoints: 5}})
	w.awaitState(2, 0)
	w.want(v4, 31001, 200, "1")
	w.want(v4, 31000, 200, "5")
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 1}, db: {Port: 31001, LocalEndpoints: 5}})
	w.awaitState(2, 0)
	w.want(v4, 31000, 200, "1")
	w.want(v4, 31001, 200, "5")

	w.tell(plan.IPv4, all, checks{})
	w.awaitState(0, 0)
	w.wantClosed(v4, 31000)
	w.wantClosed(v4, 31001)
	w.want(v6, 31000, 503, "0")
	w.stop()
	w.wantClosed(v6, 31000)
}

func TestOnlyNodePortAddressesAnswer(t *testing.T) {
	w := newWorld(t)
	v4 := w.host.Addr.V4
	w.tell(plan.IPv4, plan.NodePortAddrs{Addrs: []netip.Addr{v4}}, checks{web: {Port: 31000, LocalEndpoints: 1}})
	w.awaitState(1, 0)
	w.want(v4, 31000, 200, "1")
	w.wantClosed(netip.MustParseAddr("127.0.0.1"), 31000)
	// The node's addresses change while the plan's health checks do not.
	w.tell(plan.IPv4, plan.NodePortAddrs{Addrs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}, nil)
	w.awaitState(1, 0)
	w.want(netip.MustParseAddr("127.0.0.1"), 31000, 200, "1")
	w.wantClosed(v4, 31000)
	// A sync that failed says nothing.
	w.Services.Synced(syncer.SyncReport{Family: plan.IPv4, NodePortAddrs: all, HealthChecks: checks{}})
	w.want(netip.MustParseAddr("127.0.0.1"), 31000, 200, "1")
}

func TestAPortThatIsTakenIsTriedAgain(t *testing.T) {
	w := newWorld(t)
	taken, err := w.host.Listen("tcp4", ":31000")
	if err != nil {
		t.Fatal(err)
	}
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 1}, db: {Port: 31001, LocalEndpoints: 1}})
	w.awaitState(2, 1)
	if len(w.failures) > 0 {
		t.Errorf("told at the first failure of %s", <-w.failures)
	}
	w.ticks <- time.Now()
	w.awaitState(2, 1)
	if got := <-w.failures; got != "default/web 31000 true" {
		t.Errorf("told of %s", got)
	}
	w.want(w.host.Addr.V4, 31001, 200, "1")
	// What changes meanwhile counts when the port is free.
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 7}, db: {Port: 31001, LocalEndpoints: 1}})
	w.awaitState(2, 1)
	w.ticks <- time.Now()
	w.awaitState(2, 1)
	taken.Close()
	w.ticks <- time.Now()
	w.awaitState(2, 0)
	w.want(w.host.Addr.V4, 31000, 200, "7")
	if len(w.failures) > 0 {
		t.Errorf("told again of %s", <-w.failures)
	}
}

func TestRetryPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var tried []time.Duration
		s := NewServices(ServiceOptions{
			Listen: func(string, string) (net.Listener, error) {
				tried = append(tried, time.Since(began))
				return nil, syscall.EADDRINUSE
			},
			Log: slog.New(slog.DiscardHandler),
		})
		s.Synced(syncer.SyncReport{Family: plan.IPv4, Current: true, NodePortAddrs: all, HealthChecks: checks{web: {Port: 31000}}})
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second)
		defer cancel()
		s.Run(ctx)
		if diff := cmp.Diff([]time.Duration{0, 5 * time.Second, 10 * time.Second}, tried); diff != "" {
			t.Errorf("tried to listen after (-want +got)\n%s", diff)
		}
	})
}

// A paused process leaves the ports to the one that serves, and has
// them again when that has ended.
func TestRunAgain(t *testing.T) {
	w := newWorld(t)
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 1}})
	w.want(w.host.Addr.V4, 31000, 200, "1")
	w.stop()
	w.wantClosed(w.host.Addr.V4, 31000)
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 2}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Services.Run(ctx) }()
	w.want(w.host.Addr.V4, 31000, 200, "2")
	cancel()
	<-done
}

// failingListener has one Accept fail for each error in it.
type failingListener struct {
	net.Listener
	errors chan error
}

func (l failingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	select {
	case err = <-l.errors:
		c.Close()
		return nil, err
	default:
		return c, err
	}
}

// A server that cannot accept a connection is reported, and listens again.
func TestServerThatEndsListensAgain(t *testing.T) {
	failures := make(chan error, 1)
	w := newWorld(t, func(o *ServiceOptions) {
		listen := o.Listen
		o.Listen = func(network, addr string) (net.Listener, error) {
			l, err := listen(network, addr)
			return failingListener{l, failures}, err
		}
	})
	w.tell(plan.IPv4, all, checks{web: {Port: 31000, LocalEndpoints: 2}})
	w.want(w.host.Addr.V4, 31000, 200, "2")
	for range 2 {
		failures <- syscall.ENOMEM
		if _, _, _, err := w.ask(w.host.Addr.V4, 31000, "/"); err == nil {
			t.Error("answered without Accept")
		}
		w.awaitState(1, 1)
		if got := <-w.failures; got != "default/web 31000 false" {
			t.Errorf("reported: %s", got)
		}
		w.ticks <- time.Now()
		w.awaitState(1, 0)
		w.want(w.host.Addr.V4, 31000, 200, "2")
	}
}

// A Service that goes while its port is taken is not waited for.
func TestAFailedPortIsForgotten(t *testing.T) {
	w := newWorld(t)
	taken, err := w.host.Listen("tcp4", ":31000")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	w.tell(plan.IPv4, all, checks{web: {Port: 31000}})
	w.awaitState(1, 1)
	w.tell(plan.IPv4, all, checks{})
	w.awaitState(0, 0)
}

// A family that goes on to be served is asked for as before, and the other one
// not any more.
func TestFamiliesThatAreServed(t *testing.T) {
	w := newWorld(t)
	for _, f := range plan.Families {
		w.tell(f, all, checks{web: {Port: 31000, LocalEndpoints: 2}})
	}
	w.want(w.host.Addr.V4, 31000, 200, "2")
	w.want(w.host.Addr.V6, 31000, 200, "2")
	w.Serve([]plan.Family{plan.IPv4})
	w.eventually(func() error {
		if _, _, _, err := w.ask(w.host.Addr.V6, 31000, "/"); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("IPv6 is still answered: %v", err)
		}
		return nil
	})
	w.want(w.host.Addr.V4, 31000, 200, "2")
}

// Without anybody who knows, the dataplane counts as healthy.
func TestServiceHealthWithoutHealthz(t *testing.T) {
	s := NewServices(ServiceOptions{Log: slog.New(slog.DiscardHandler)})
	sv := &server{service: web}
	sv.local.Store(1)
	r := newRecorder()
	s.handler(sv).ServeHTTP(r, nil)
	if r.status != 200 {
		t.Errorf("%d: %s", r.status, r.body)
	}
}

type recorder struct {
	status int
	body   []byte
	header http.Header
}

func newRecorder() *recorder                    { return &recorder{header: http.Header{}} }
func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { r.body = append(r.body, b...); return len(b), nil }

// Services that come and go, and ports that move, leave no socket behind.
func TestChurnLeavesNothing(t *testing.T) {
	w := newWorld(t)
	name := func(i int) plan.ServiceName {
		return plan.ServiceName{Namespace: "churn", Name: fmt.Sprint(i)}
	}
	files := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	w.tell(plan.IPv4, all, checks{})
	w.awaitState(0, 0)
	before := files()
	for round := range 30 {
		want := checks{}
		for i := range 40 {
			want[name(i+round%5)] = plan.HealthCheck{Port: uint16(31000 + (i*7+round)%50), LocalEndpoints: i}
		}
		// Each port once.
		seen := map[uint16]bool{}
		maps.DeleteFunc(want, func(_ plan.ServiceName, c plan.HealthCheck) bool {
			defer func() { seen[c.Port] = true }()
			return seen[c.Port]
		})
		w.tell(plan.IPv4, all, want)
		w.tell(plan.IPv6, all, want)
		w.awaitState(len(want), 0)
		for _, c := range want {
			status := 503
			if c.LocalEndpoints > 0 {
				status = 200
			}
			w.want(w.host.Addr.V4, c.Port, status, fmt.Sprint(c.LocalEndpoints))
			break
		}
	}
	w.tell(plan.IPv6, all, checks{})
	w.tell(plan.IPv4, all, checks{})
	w.awaitState(0, 0)
	w.eventually(func() error {
		if n := files(); n > before {
			return fmt.Errorf("%d files are open, before there were %d", n, before)
		}
		return nil
	})
}
