// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"signalbox/conntrack"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

// Trace prints the connections of a Service while they live. It keeps nothing about a
// connection, so that its memory does not grow with their number.
type Trace struct {
	// Ask asks the daemon for the Service's frontends.
	Ask func(context.Context) (*Frontends, error)
	// Follow opens the source of events.
	Follow func() (EventSource, error)
	// Flows lists the connections that are there at the beginning.
	Flows FlowLister
	// Limit is how many events a second are printed. The others are counted.
	Limit int
	Print func(TraceLine)
	// AskAgain is how often the daemon is asked again, because a Service may get
	// another frontend; askAgain when zero.
	AskAgain time.Duration

	known   *Frontends
	index   *frontendIndex // of known
	events  EventSource
	unknown error // why the last question to the daemon has no answer
	limiter *rate.Limiter
	leftOut int // events since the last line about them
	lost    int // overflows of the socket since the last line about them
}

// EventSource has the methods of conntrack.Events.
type EventSource interface {
	Begin(ports []uint16) error
	Next(func(conntrack.Event)) error
	Close() error
}

// TraceLine is one line of a Trace. docs/explain.md documents its JSON form.
type TraceLine struct {
	Time time.Time `json:"time"`
	// Event is a conntrack.Step, or one of the lines about the trace itself: "note",
	// "leftOut" or "lost".
	Event string `json:"event"`
	// Text is that of a line about the trace itself.
	Text string `json:"text,omitempty"`
	// Count is the number of events of "leftOut", and of overflows of "lost".
	Count int `json:"count,omitempty"`

	Service  string `json:"service,omitempty"`
	Port     string `json:"port,omitempty"`
	Protocol string `json:"protocol,omitempty"`
	Client   string `json:"client,omitempty"`
	Frontend string `json:"frontend,omitempty"`
	Endpoint string `json:"endpoint,omitempty"` // it answers
	Source   string `json:"source,omitempty"`   // the client as the endpoint sees it
	// Relayed says that Endpoint is the relay of this node, which chooses the endpoint.
	Relayed bool `json:"relayed,omitempty"`
	// Untranslated says that no rule has chosen an endpoint.
	Untranslated bool   `json:"untranslated,omitempty"`
	ID           uint32 `json:"id,omitempty"`
}

// The lines about the trace itself.
const (
	noteLine    = "note"
	leftOutLine = "leftOut"
	lostLine    = "lost"
)

// askAgain is the default of Trace.AskAgain.
const askAgain = 5 * time.Second

// maxWaiting is how many events wait to be printed. More wait in the socket, and more
// than it holds are lost.
const maxWaiting = 1024

// Run prints until ctx ends.
func (t *Trace) Run(ctx context.Context) (err error) {
	t.limiter = rate.NewLimiter(rate.Limit(t.Limit), t.Limit)
	if t.known, err = t.Ask(ctx); err != nil {
		return err
	}
	if t.known.Sentence != "" {
		return errors.New(t.known.Sentence)
	}
	t.index = t.known.index()
	if t.events, err = t.Follow(); err != nil {
		return err
	}
	defer t.events.Close()
	t.describe()
	// Events come before the list, so that no connection is missed in between.
	if err := t.events.Begin(t.known.portNumbers()); err != nil {
		return err
	}
	t.list(ctx)
	return t.follow(ctx)
}

// update is what the daemon says when it is asked again.
type update struct {
	frontends *Frontends
	err       error
}

func (t *Trace) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	events, failed, updates := make(chan conntrack.Event, maxWaiting), make(chan error), make(chan update)
	var work sync.WaitGroup
	work.Go(func() { t.read(ctx, events, failed) })
	work.Go(func() {
		for wait.For(ctx, cmp.Or(t.AskAgain, askAgain)) {
			f, err := t.Ask(ctx)
			send(ctx, updates, update{f, err})
		}
	})
	defer func() {
		cancel()
		t.events.Close() // ends read
		work.Wait()
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			t.summarize()
			return nil
		case e := <-events:
			t.show(e)
		case err := <-failed:
			if !errors.Is(err, conntrack.ErrEventsLost) {
				return err
			}
			t.lost++
		case u := <-updates:
			if err := t.apply(u); err != nil {
				return err
			}
		case <-tick.C:
			t.summarize()
		}
	}
}

// read passes on events until ctx ends, or an error other than a loss.
func (t *Trace) read(ctx context.Context, events chan<- conntrack.Event, failed chan<- error) {
	for ctx.Err() == nil {
		err := t.events.Next(func(e conntrack.Event) { send(ctx, events, e) })
		if err == nil {
			continue
		}
		send(ctx, failed, err)
		if !errors.Is(err, conntrack.ErrEventsLost) {
			return
		}
	}
}

// send gives up when ctx ends.
func send[T any](ctx context.Context, to chan<- T, value T) {
	select {
	case to <- value:
	case <-ctx.Done():
	}
}

// describe says what is followed.
func (t *Trace) describe() {
	f := t.known
	for i, p := range f.Ports {
		if i == maxListed {
			t.note("and %d more Service ports", len(f.Ports)-i)
			break
		}
		name := p.Service
		if p.Port != "" {
			name += ":" + p.Port
		}
		texts := make([]string, len(p.Keys))
		for i, key := range p.Keys {
			texts[i] = key.String()
		}
		t.note("Service %s on node %s in mode %s: %s", name, f.Node, f.Mode, list(texts))
	}
	if len(f.Relays) > 0 {
		t.note("the relay of this node answers the client and chooses the endpoint; its own connections to endpoints are not shown")
	}
	for _, p := range f.Problems {
		t.note("problem: %s", p)
	}
}

// apply follows what the daemon says now.
func (t *Trace) apply(u update) error {
	switch {
	case u.err != nil && t.unknown == nil:
		t.note("changes of the frontends are not noticed from now on: %v", u.err)
	case u.err == nil && t.unknown != nil:
		t.note("the daemon answers again")
	}
	if t.unknown = u.err; u.err != nil {
		return nil
	}
	before := t.known
	t.known, t.index = u.frontends, u.frontends.index() // the addresses of the node, in any case
	if t.known.Mode == before.Mode && reflect.DeepEqual(t.known.Ports, before.Ports) {
		return nil
	}
	t.describe()
	if t.known.Sentence != "" {
		t.note("%s", t.known.Sentence)
	}
	return t.events.Begin(t.known.portNumbers())
}

// list shows the connections that are there already.
func (t *Trace) list(ctx context.Context) {
	if err := t.index.list(ctx, t.Flows, t.show); err != nil && ctx.Err() == nil {
		t.note("the open connections are not known: %v", err)
	}
}

// show prints an event that belongs to the Service.
func (t *Trace) show(e conntrack.Event) {
	i, found := t.index.find(e.Frontend, e.Protocol)
	if !found {
		return
	}
	p := &t.known.Ports[i]
	if !t.limiter.Allow() {
		t.leftOut++
		return
	}
	t.Print(TraceLine{
		Time: time.Now(), Event: string(e.Step), Service: p.Service, Port: p.Port, Protocol: e.Protocol.String(),
		Client: e.Client.String(), Frontend: e.Frontend.String(), Endpoint: e.Endpoint.String(), Source: e.Source.String(),
		Relayed: plan.AnyContains(t.known.Relays, e.Endpoint.Addr()), Untranslated: e.Endpoint == e.Frontend, ID: e.ID,
	})
}

// summarize says what was not shown.
func (t *Trace) summarize() {
	if t.leftOut > 0 {
		t.Print(TraceLine{Time: time.Now(), Event: leftOutLine, Count: t.leftOut, Text: fmt.Sprintf("%d events are left out: more than %d came in a second (--limit)", t.leftOut, t.Limit)})
	}
	if t.lost > 0 {
		t.Print(TraceLine{Time: time.Now(), Event: lostLine, Count: t.lost, Text: "the kernel has reported events faster than they were read, and some are lost"})
	}
	t.leftOut, t.lost = 0, 0
}

func (t *Trace) note(format string, args ...any) {
	t.Print(TraceLine{Time: time.Now(), Event: noteLine, Text: fmt.Sprintf(format, args...)})
}

// PrintText writes the line for people.
func (l TraceLine) PrintText(w io.Writer) {
	if l.Text != "" {
		fmt.Fprintf(w, "# %s\n", l.Text)
		return
	}
	client, endpoint := l.Client, l.Endpoint
	if l.Source != l.Client {
		client += " as " + l.Source
	}
	switch {
	case l.Relayed:
		endpoint = "the relay"
	case l.Untranslated:
		endpoint = "not translated"
	}
	fmt.Fprintf(w, "%s  %-8s  %-4s  %s -> %s -> %s\n", l.Time.Format("15:04:05.000"), l.Event, strings.ToLower(l.Protocol), client, l.Frontend, endpoint)
}
