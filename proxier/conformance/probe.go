// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"signalbox/internal/netlab"
)

const (
	// attempts is how often a probe is made at least, where a wrong answer
	// could come up by chance.
	attempts = 8
	// attemptsPerServer bounds the search for servers that did not answer yet:
	// the chance that an evenly chosen one is missed by all of them is below
	// 1 in 10^12.
	attemptsPerServer = 30
	// answerWait and silenceWait are the least times after which a missing
	// answer counts as none, where one is expected and where none is. They
	// alone do not decide: see attempt.
	answerWait  = 2 * time.Second
	silenceWait = 100 * time.Millisecond
	// giveUp ends whatever hangs in spite of everything.
	giveUp = time.Minute
)

// attempt runs ask, which sends one question and waits for its answer. Silence
// is concluded only when, after the wait, three questions sent later on the
// same wires have been answered: on a machine however slow, the answer would
// have been there before theirs.
func (w *world) attempt(ctx context.Context, h *netlab.Host, network string, wait time.Duration, ask func(context.Context) (netlab.Answer, error)) (netlab.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, giveUp)
	defer cancel()
	type result struct {
		answer netlab.Answer
		err    error
	}
	done := make(chan result, 1)
	go func() {
		a, err := ask(ctx)
		done <- result{a, err}
	}()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.answer, r.err
	case <-timer.C:
	}
	for _, name := range []string{"node1", "pod-a", "pod-c"} {
		at := netip.AddrPortFrom(ofFamily(w.lab.Host(name).Addr, w.symbols.family), netlab.ControlPort)
		if _, err := h.Ask(ctx, network, netip.AddrPort{}, at); err != nil && name != h.Name {
			cancel()
			<-done
			return netlab.Answer{}, fmt.Errorf("the lab itself is broken: %s cannot reach %s directly: %v", h.Name, name, err)
		}
	}
	cancel()
	r := <-done
	return r.answer, r.err
}

// resolved is a probe with addresses in the place of symbols.
type resolved struct {
	host    *netlab.Host
	network string
	source  netip.AddrPort
	target  netip.AddrPort
}

func (w *world) resolve(p probe) (r resolved, err error) {
	if r.host = w.lab.Host(p.host); r.host == nil {
		return r, fmt.Errorf("the lab has no host %q", p.host)
	}
	r.network = p.network
	text, err := w.symbols.expand(p.target)
	if err != nil {
		return r, err
	}
	if r.target, err = target(text); err != nil {
		return r, err
	}
	if p.at != "" {
		a, err := w.addr(p.at)
		if err != nil {
			return r, err
		}
		r.source = netip.AddrPortFrom(a, 0)
	}
	return r, nil
}

func (w *world) addr(text string) (netip.Addr, error) {
	text, err := w.symbols.expand(text)
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(text)
}

func (w *world) once(ctx context.Context, r resolved, wait time.Duration) (netlab.Answer, error) {
	return w.attempt(ctx, r.host, r.network, wait, func(ctx context.Context) (netlab.Answer, error) {
		return r.host.Ask(ctx, r.network, r.source, r.target)
	})
}

// probe makes fresh connections until it is sure of what they meet.
func (w *world) probe(ctx context.Context, p probe, e expectation) error {
	r, err := w.resolve(p)
	if err != nil {
		return err
	}
	switch e.outcome {
	case answered:
	case arrives:
		return w.probeOneWay(ctx, r, e)
	default:
		return w.probeUnanswered(ctx, r, e)
	}
	servers, err := w.servers(e.servers)
	if err != nil {
		return err
	}
	seen := map[string]int{}
	for n := 0; n < attempts || !e.same && len(seen) < len(servers); n++ {
		if n == max(attempts, attemptsPerServer*len(servers)) {
			return fmt.Errorf("after %d connections not every endpoint was reached: %v", n, seen)
		}
		a, err := w.once(ctx, r, answerWait)
		if err := w.check(e, servers, a, err, seen); err != nil {
			return fmt.Errorf("connection %d: %w", n+1, err)
		}
	}
	return nil
}

// check compares one attempt with what must happen, and counts who answered.
func (w *world) check(e expectation, servers []string, a netlab.Answer, err error, seen map[string]int) error {
	if got := netlab.OutcomeOf(err); !e.outcome.matches(got) {
		if err != nil {
			return fmt.Errorf("%s (%v)", got, err)
		}
		return fmt.Errorf("answered by %s", a)
	}
	if e.outcome != answered && e.outcome != arrives {
		return nil
	}
	i := slices.IndexFunc(servers, func(s string) bool { return s == a.Server || s == fmt.Sprintf("%s:%d", a.Server, a.At.Port()) })
	if i < 0 {
		return fmt.Errorf("answered by %s", a)
	}
	seen[servers[i]]++
	if e.same && len(seen) > 1 {
		return fmt.Errorf("answered by several: %v", seen)
	}
	return w.checkSource(e.source, a)
}

func (w *world) checkSource(want string, a netlab.Answer) error {
	if want == "" {
		return nil
	}
	var allowed []netip.Addr
	if h := w.lab.Host(want); h != nil {
		all, err := h.Addrs()
		if err != nil {
			return err
		}
		allowed = all
		if w.mode.NodeSource != nil && w.mode.NodeSource(w.podLink, want, a.Server) {
			node, err := w.lab.Host("node1").Addrs()
			if err != nil {
				return err
			}
			allowed = append(allowed, node...)
		}
	} else {
		one, err := w.addr(want)
		if err != nil {
			return err
		}
		allowed = []netip.Addr{one}
	}
	if !slices.Contains(allowed, a.Seen.Addr()) {
		return fmt.Errorf("answered by %s; the source must be %s (%v)", a, want, allowed)
	}
	return nil
}

func (w *world) servers(names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		name, err := w.symbols.expand(strings.TrimSuffix(name, ","))
		if err != nil {
			return nil, err
		}
		host, _, _ := strings.Cut(name, ":")
		if w.lab.Host(host) == nil {
			return nil, fmt.Errorf("the lab has no host %q", host)
		}
		out = append(out, name)
	}
	return out, nil
}

// probeUnanswered makes its attempts side by side: silence takes time.
func (w *world) probeUnanswered(ctx context.Context, r resolved, e expectation) error {
	n, wait := 3, answerWait
	if e.outcome == dropped || e.outcome == unanswered {
		n, wait = 1, silenceWait
	}
	var group errgroup.Group
	for range n {
		group.Go(func() error {
			a, err := w.once(ctx, r, wait)
			return w.check(e, nil, a, err, nil)
		})
	}
	return group.Wait()
}

// oneWay is how many datagrams of a flow must arrive where nobody answers.
const oneWay = 5

// probeOneWay sends datagrams to a port that answers none.
func (w *world) probeOneWay(ctx context.Context, r resolved, e expectation) error {
	servers, err := w.servers(e.servers)
	if err != nil {
		return err
	}
	c, err := r.host.Open(ctx, r.network, r.source, r.target)
	if err != nil {
		return err
	}
	defer c.Close()
	seen := map[string]int{}
	for n := range oneWay {
		a, err := w.attempt(ctx, r.host, r.network, answerWait, c.Tell)
		if err := w.check(e, servers, a, err, seen); err != nil {
			return fmt.Errorf("datagram %d: %w", n+1, err)
		}
	}
	return nil
}

// open makes a connection and keeps it.
func (w *world) open(ctx context.Context, name string, p probe, e expectation) error {
	if w.conns[name] != nil {
		return fmt.Errorf("%s is open already", name)
	}
	r, err := w.resolve(p)
	if err != nil {
		return err
	}
	servers, err := w.servers(e.servers)
	if err != nil {
		return err
	}
	c, err := r.host.Open(ctx, r.network, r.source, r.target)
	if err != nil {
		return err
	}
	w.conns[name] = &heldConn{Conn: c, host: r.host, network: r.network}
	a, err := w.ask(ctx, w.conns[name], e)
	w.conns[name].seen = a.Seen
	return w.check(e, servers, a, err, map[string]int{})
}

type heldConn struct {
	*netlab.Conn
	host    *netlab.Host
	network string
	seen    netip.AddrPort // source that the server saw last
}

func (w *world) ask(ctx context.Context, c *heldConn, e expectation) (netlab.Answer, error) {
	wait := answerWait
	if e.outcome == dropped || e.outcome == unanswered {
		wait = silenceWait
	}
	return w.attempt(ctx, c.host, c.network, wait, c.Ask)
}

// held asks again on a connection that was opened before. Flows are removed
// beside the sync, so that a UDP flow may meet its old fate for a moment.
func (w *world) held(ctx context.Context, name string, e expectation) error {
	c := w.conns[name]
	if c == nil {
		return fmt.Errorf("nothing was opened as %q", name)
	}
	servers, err := w.servers(e.servers)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		a, err := w.ask(ctx, c, e)
		wrong := w.checkHeld(c, e, servers, a, err)
		if wrong == nil || e.source == same || c.network != "udp" || time.Now().After(deadline) {
			return wrong
		}
	}
}

// same, as the source of a held connection, demands that its flow was not
// touched: a new one would get another port from the masquerade.
const same = "same"

func (w *world) checkHeld(c *heldConn, e expectation, servers []string, a netlab.Answer, err error) error {
	before := c.seen
	c.seen = a.Seen
	if e.source == same {
		e.source = ""
		if err == nil && before != a.Seen {
			return fmt.Errorf("answered by %s; the source before was %s", a, before)
		}
	}
	return w.check(e, servers, a, err, map[string]int{})
}

// crowd is many clients with an address each, whose servers are remembered.
type crowd struct {
	probe   probe
	rule    string // "->", "stay" or "move"
	servers []string
	except  string
	stayFor time.Duration
}

// crowdSize makes it sure enough that three endpoints are all used: one of them
// is missed once in 10^6 runs.
const crowdSize = 36

func (c *crowd) run(ctx context.Context, w *world) error {
	r, err := w.resolve(c.probe)
	if err != nil {
		return err
	}
	sources, err := w.crowdSources()
	if err != nil {
		return err
	}
	if c.stayFor > 0 {
		return c.keepComing(ctx, w, r, sources)
	}
	if c.rule == "move" {
		// In the order in which they came first, a mode that takes endpoints in
		// turn might choose the same ones again for all of them.
		slices.Reverse(sources)
	}
	now, err := c.round(ctx, w, r, sources)
	if err != nil {
		return err
	}
	err = c.judge(w, now)
	w.crowd = now
	return err
}

// round lets every client connect and returns who answered whom. With affinity
// each client must get one server however often it asks.
func (c *crowd) round(ctx context.Context, w *world, r resolved, sources []netip.Addr) (map[netip.Addr]string, error) {
	now := map[netip.Addr]string{}
	for _, source := range sources {
		r.source = netip.AddrPortFrom(source, 0)
		for range 3 {
			a, err := w.once(ctx, r, answerWait)
			if err != nil {
				return nil, fmt.Errorf("client %s: %s (%w)", source, netlab.OutcomeOf(err), err)
			}
			if before, ok := now[source]; ok && before != a.Server {
				return nil, fmt.Errorf("client %s was answered by %s and by %s", source, before, a)
			}
			now[source] = a.Server
		}
	}
	return now, nil
}

func (c *crowd) judge(w *world, now map[netip.Addr]string) error {
	count := map[string]int{}
	moved := 0
	for source, server := range now {
		before := w.crowd[source]
		count[server]++
		if before != server {
			moved++
		}
		if c.rule == "stay" && before != server && before != c.except {
			return fmt.Errorf("client %s was with %s and is with %s now", source, before, server)
		}
	}
	if c.rule == "move" && moved == 0 {
		return fmt.Errorf("all %d clients are with whom they were: %v", len(now), count)
	}
	servers, err := w.servers(c.servers)
	if err != nil || len(servers) == 0 {
		return err
	}
	for _, s := range servers {
		if count[s] == 0 {
			return fmt.Errorf("no client is with %s: %v", s, count)
		}
		delete(count, s)
	}
	if len(count) > 0 {
		return fmt.Errorf("clients are also with %v", count)
	}
	return nil
}

// keepComing lets a few clients connect again and again for the given time,
// which must be longer than the affinity's time-out to mean anything: no client
// may move. Where this machine itself let a client wait for longer than
// maxPause, its move proves nothing, and the time begins anew.
func (c *crowd) keepComing(ctx context.Context, w *world, r resolved, sources []netip.Addr) error {
	var before map[netip.Addr]string
	start := time.Now()
	began, last := start, start
	for time.Since(began) < c.stayFor {
		now, err := c.round(ctx, w, r, sources[:4])
		if err != nil {
			return err
		}
		paused := time.Since(last) > maxPause
		if before != nil && !maps.Equal(before, now) && !paused {
			return fmt.Errorf("clients were with %v and are with %v now", before, now)
		}
		if paused && time.Since(start) < giveUp {
			began = time.Now()
		}
		before, last = now, time.Now()
	}
	for source, server := range before {
		w.crowd[source] = server
	}
	return nil
}

// maxPause is well below the shortest time-out that a scenario uses with
// "stay for".
const maxPause = time.Second

// crowdSources gives client1 its many addresses.
func (w *world) crowdSources() ([]netip.Addr, error) {
	base := rangeOf(netlab.ClientNetwork, w.symbols.family).Addr()
	var sources []netip.Addr
	for i := range crowdSize {
		sources = append(sources, nthAddr(base, 100+i))
	}
	if w.crowd != nil {
		return sources, nil
	}
	for _, a := range sources {
		if err := w.lab.Host("client1").AddAddr(a); err != nil {
			return nil, err
		}
	}
	w.crowd = map[netip.Addr]string{}
	return sources, nil
}

var errNotReported = errors.New("no such problem was reported")
