// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"signalbox/conntrack"
	"signalbox/proxier/plan"
)

// script is a source of events that a test writes.
type script struct {
	events chan any // conntrack.Event or error
	closed chan struct{}
	once   sync.Once
	ports  chan []uint16
}

func newScript() *script {
	return &script{events: make(chan any, 100), closed: make(chan struct{}), ports: make(chan []uint16, 10)}
}

func (s *script) Begin(ports []uint16) error {
	s.ports <- ports
	return nil
}

func (s *script) Next(fn func(conntrack.Event)) error {
	select {
	case <-s.closed:
		return errors.New("closed")
	case next := <-s.events:
		if e, ok := next.(conntrack.Event); ok {
			fn(e)
			return nil
		}
		return next.(error)
	}
}

func (s *script) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// tracing runs a Trace about the flows of the test's world.
type tracing struct {
	*script
	t      *testing.T
	lines  chan string
	cancel context.CancelFunc
	done   chan error
}

func trace(t *testing.T, ask func(context.Context) (*Frontends, error), limit int) *tracing {
	t.Helper()
	tr := &tracing{newScript(), t, make(chan string, 100), nil, make(chan error, 1)}
	var ctx context.Context
	ctx, tr.cancel = context.WithCancel(t.Context())
	run := Trace{
		Ask: ask, Follow: func() (EventSource, error) { return tr.script, nil }, Flows: flows, Limit: limit, AskAgain: 10 * time.Millisecond,
		Print: func(l TraceLine) {
			var text strings.Builder
			l.PrintText(&text)
			_, text1, found := strings.Cut(text.String(), "  ") // without the time
			if !found {
				text1 = text.String()
			}
			tr.lines <- strings.Join(strings.Fields(text1), " ")
		},
	}
	go func() { tr.done <- run.Run(ctx) }()
	return tr
}

func (tr *tracing) want(lines ...string) {
	tr.t.Helper()
	for _, want := range lines {
		select {
		case got := <-tr.lines:
			if got != want {
				tr.t.Errorf("the line is\n%s, want\n%s", got, want)
			}
		case err := <-tr.done:
			tr.t.Fatalf("it ends with %v before %s", err, want)
		}
	}
}

func (tr *tracing) event(step conntrack.Step, client, frontend, endpoint, source string) {
	at := netip.MustParseAddrPort
	tr.events <- conntrack.Event{
		Flow: conntrack.Flow{Client: at(client), Frontend: at(frontend), Endpoint: at(endpoint), Source: at(source)},
		Step: step, Family: plan.IPv4, Protocol: plan.TCP, ID: 7,
	}
}

// asked has the world's daemon answer about its Service, and others.
func asked(t *testing.T, target string) func(context.Context) (*Frontends, error) {
	w := newWorld(t)
	w.start()
	s := Subject{Environment: Environment{Node: "node1", Mode: "test", Live: true}, Loop: w.loop}
	q, err := ParseQuestion(target, "")
	if err != nil {
		t.Fatal(err)
	}
	return func(context.Context) (*Frontends, error) { return s.frontends(q), nil }
}

func TestTraceLines(t *testing.T) {
	tr := trace(t, asked(t, "default/web"), 100)
	tr.want(
		"# Service default/web:http on node node1 in mode test: 10.96.0.10:80/tcp, 198.51.100.7:80/tcp, 203.0.113.5:80/tcp, node:30080/tcp",
		"open tcp 10.244.1.12:4000 -> 10.96.0.10:80 -> 10.244.1.5:8080",
		"open tcp 192.0.2.99:4001 as 192.0.2.1:5000 -> 192.0.2.1:30080 -> 10.244.1.99:8080",
	)
	if ports := <-tr.ports; !slices.Equal(ports, []uint16{80, 30080}) {
		t.Errorf("the events of ports %v are asked for", ports)
	}
	tr.event(conntrack.StepNew, "10.244.1.12:4003", "10.96.0.11:80", "10.244.1.5:8080", "10.244.1.12:4003") // another Service
	tr.event(conntrack.StepNew, "10.244.1.12:4003", "203.0.113.5:80", "203.0.113.5:80", "10.244.1.12:4003")
	tr.event(conntrack.StepEnd, "10.244.1.12:4003", "203.0.113.5:80", "10.244.1.6:8080", "10.244.1.12:4003")
	tr.want(
		"new tcp 10.244.1.12:4003 -> 203.0.113.5:80 -> not translated",
		"end tcp 10.244.1.12:4003 -> 203.0.113.5:80 -> 10.244.1.6:8080",
	)
	tr.events <- conntrack.ErrEventsLost
	tr.want("# the kernel has reported events faster than they were read, and some are lost")
	tr.cancel()
	if err := <-tr.done; err != nil {
		t.Error(err)
	}
}

// What is above the limit is counted.
func TestTraceLimit(t *testing.T) {
	ask := asked(t, "10.96.0.10:80")
	tr := trace(t, ask, 1)
	tr.want("# Service default/web:http on node node1 in mode test: 10.96.0.10:80/tcp", "open tcp 10.244.1.12:4000 -> 10.96.0.10:80 -> 10.244.1.5:8080")
	tr.event(conntrack.StepNew, "10.244.1.12:4003", "10.96.0.10:80", "10.244.1.5:8080", "10.244.1.12:4003")
	for line := range tr.lines {
		if line == "# 1 events are left out: more than 1 came in a second (--limit)" {
			break
		}
		tr.event(conntrack.StepNew, "10.244.1.12:4004", "10.96.0.10:80", "10.244.1.5:8080", "10.244.1.12:4004")
	}
	tr.cancel()
	if err := <-tr.done; err != nil {
		t.Error(err)
	}
}

// A relay answers in the place of an endpoint.
func TestTraceRelay(t *testing.T) {
	tr := trace(t, func(ctx context.Context) (*Frontends, error) {
		f, err := asked(t, "default/web")(ctx)
		f.Relays, f.Problems = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, []string{"something"}
		return f, err
	}, 100)
	<-tr.lines
	tr.want("# the relay of this node answers the client and chooses the endpoint; its own connections to endpoints are not shown",
		"# problem: something", "open tcp 10.244.1.12:4000 -> 10.96.0.10:80 -> the relay")
	tr.cancel()
	if err := <-tr.done; err != nil {
		t.Error(err)
	}
}

// The Service changes, and the daemon goes and comes back.
func TestTraceFollowsTheDaemon(t *testing.T) {
	answers := make(chan *Frontends, 1)
	ask := func(ctx context.Context) (*Frontends, error) {
		select {
		case f := <-answers:
			if f == nil {
				return nil, errors.New("gone")
			}
			return f, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	with := func(addrs ...string) *Frontends {
		f := &Frontends{Node: "node1", Mode: "test"}
		for _, a := range addrs {
			at := netip.MustParseAddrPort(a)
			f.Ports = append(f.Ports, FrontendPort{"default/web", "", plan.IPv4, []plan.FrontendKey{{Addr: at.Addr(), Port: at.Port(), Protocol: plan.TCP}}})
		}
		if len(addrs) == 0 {
			f.Sentence = "There is no Service."
		}
		return f
	}
	tr := trace(t, ask, 100)
	answers <- with("10.96.0.10:80")
	tr.want("# Service default/web on node node1 in mode test: 10.96.0.10:80/tcp", "open tcp 10.244.1.12:4000 -> 10.96.0.10:80 -> 10.244.1.5:8080")
	answers <- nil
	tr.want("# changes of the frontends are not noticed from now on: gone")
	answers <- with("10.96.0.10:80")
	tr.want("# the daemon answers again")
	answers <- with("10.96.0.11:81")
	tr.want("# Service default/web on node node1 in mode test: 10.96.0.11:81/tcp")
	if first, second := <-tr.ports, <-tr.ports; !slices.Equal(first, []uint16{80}) || !slices.Equal(second, []uint16{81}) {
		t.Errorf("the events of ports %v and %v are asked for", first, second)
	}
	tr.event(conntrack.StepNew, "10.244.1.12:4003", "10.96.0.11:81", "10.244.1.5:8080", "10.244.1.12:4003")
	tr.want("new tcp 10.244.1.12:4003 -> 10.96.0.11:81 -> 10.244.1.5:8080")
	answers <- with()
	tr.want("# There is no Service.")
	tr.events <- errors.New("broken")
	if err := <-tr.done; err == nil || err.Error() != "broken" {
		t.Errorf("a source that fails: %v", err)
	}
	tr = trace(t, ask, 100)
	answers <- with()
	if err := <-tr.done; err == nil || err.Error() != "There is no Service." {
		t.Errorf("a Service that does not exist: %v", err)
	}
}
