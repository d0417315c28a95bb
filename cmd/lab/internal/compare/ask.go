// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/netlab"
)

// effort says how hard a probe is tried.
type effort struct {
	// timeout is how long a try waits at least. TCP repeats a lost SYN after a second.
	timeout time.Duration
	// waves are how many tries run at once, one wave after the other, if n endpoints may
	// answer.
	waves func(n int) []int
	// round picks the source addresses of the clients that have many. The first is 0.
	round int
}

// Rounds of a comparison: a quick one, and three to confirm each difference. If half of
// the endpoints are silent, 16 tries miss the others in one of 65,536 probes; three tries
// missed them in one of eight.
var (
	quick   = effort{timeout: 1600 * time.Millisecond, waves: func(n int) []int { return []int{n + 1, 2*n + 1} }}
	careful = effort{timeout: 2400 * time.Millisecond, waves: func(n int) []int { return []int{max(16, 8*n+6)} }}
)

const (
	confirmations = 3
	// sourcesPerRound make it sure enough that four endpoints with affinity are all
	// seen.
	sourcesPerRound = 24
)

// sources are the addresses of a client for one round, or one that is not valid.
func (e effort) sources(p Probe) []netip.AddrPort {
	network := map[string]netlab.PrefixPair{"client1": netlab.ClientNetwork, "client2": netlab.ClientNetwork2}[p.Client]
	if !network.V4.IsValid() || !p.sticky || p.Network == "sctp" {
		return []netip.AddrPort{{}}
	}
	all := make([]netip.AddrPort, sourcesPerRound)
	for i := range all {
		a := manySources(network, e.round*sourcesPerRound+i)
		if p.Target.Addr().Is4() {
			all[i] = netip.AddrPortFrom(a.V4, 0)
		} else {
			all[i] = netip.AddrPortFrom(a.V6, 0)
		}
	}
	return all
}

// plan are the source addresses of the tries in each wave. With affinity, the first
// connection of an address chooses its endpoint, so it goes alone.
func (e effort) plan(p Probe) [][]netip.AddrPort {
	sources := e.sources(p)
	if len(sources) > 1 {
		return [][]netip.AddrPort{sources, sources}
	}
	sizes := e.waves(p.most)
	if p.sticky {
		sizes = append([]int{1}, sizes...)
	}
	var waves [][]netip.AddrPort
	for _, n := range sizes {
		waves = append(waves, slices.Repeat(sources, n))
	}
	return waves
}

// manySources are the further addresses of an outside client.
func manySources(network netlab.PrefixPair, n int) netlab.Pair { return network.Nth(20 + n) }

// addSources gives the outside clients their further addresses.
func addSources(lab *netlab.Lab) error {
	for name, network := range map[string]netlab.PrefixPair{"client1": netlab.ClientNetwork, "client2": netlab.ClientNetwork2} {
		for n := range sourcesPerRound * (confirmations + 1) {
			a := manySources(network, n)
			if err := errors.Join(lab.Host(name).AddAddr(a.V4), lab.Host(name).AddAddr(a.V6)); err != nil {
				return err
			}
		}
	}
	return nil
}

// asker tries probes in one lab.
type asker struct {
	lab     *netlab.Lab
	control *control
	tries   chan struct{} // limits how many run at once
}

func newAsker(lab *netlab.Lab) *asker {
	return &asker{lab: lab, control: startControl(lab), tries: make(chan struct{}, maxTries())}
}

func (a *asker) close() { a.control.close() }

// maxTries is how many tries run at once in a lab: thousands wait for silence. A try has
// up to three open files, and there are two labs.
func maxTries() int {
	limit := unix.Rlimit{Cur: 1 << 16, Max: 1 << 16}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) != nil && unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 100
	}
	return min(4000, int(limit.Cur/8))
}

// askAll runs probes. The outcomes are in the order of the probes. With affinity, the
// addresses of a Service share a client's endpoint, so a client tries one after the other.
func (a *asker) askAll(ctx context.Context, probes []Probe, e effort) []Outcome {
	outcomes := make([]Outcome, len(probes))
	turns := map[string]*sync.Mutex{}
	var all sync.WaitGroup
	for i, p := range probes {
		key := fmt.Sprint(i)
		if p.sticky {
			key = fmt.Sprint(p.service, p.Client, p.Network, p.Target.Addr().Is4())
		}
		if turns[key] == nil {
			turns[key] = &sync.Mutex{}
		}
		turn := turns[key]
		all.Go(func() {
			turn.Lock()
			defer turn.Unlock()
			outcomes[i] = a.ask(ctx, p, e)
		})
	}
	all.Wait()
	return outcomes
}

// ask tries a probe until it brings no news.
func (a *asker) ask(ctx context.Context, p Probe, e effort) Outcome {
	t := newTally()
	waves := e.plan(p)
	for _, sources := range waves {
		var wave sync.WaitGroup
		for _, source := range sources {
			wave.Go(func() {
				answer, at, err := a.try(ctx, p, e.timeout, source)
				t.add(source, answer, at, err)
			})
		}
		wave.Wait()
		if ctx.Err() != nil || t.complete(p, e) {
			break
		}
	}
	return t.outcome(p, len(e.sources(p)) > 1)
}

// try makes one connection, and returns the answer and who gave it.
func (a *asker) try(ctx context.Context, p Probe, timeout time.Duration, source netip.AddrPort) (string, netip.AddrPort, error) {
	a.tries <- struct{}{}
	defer func() { <-a.tries }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silent := time.AfterFunc(timeout, func() {
		<-a.control.later()
		cancel()
	})
	defer silent.Stop()
	host := a.lab.Host(p.Client)
	if p.Network == healthNetwork {
		answer, err := healthAnswer(ctx, host, p.Target)
		return answer, p.Target, err
	}
	answer, err := host.Ask(ctx, p.Network, source, p.Target)
	if err != nil {
		return "", answer.At, err
	}
	return fmt.Sprintf("%s %s sees %s", answer.Server, answer.At, sourceName(host, source.Addr(), answer.Seen.Addr())), answer.At, nil
}

// healthAnswer is what a health check node port answers.
func healthAnswer(ctx context.Context, host *netlab.Host, at netip.AddrPort) (string, error) {
	client := host.Client()
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at.String()+"/healthz", nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	var line bytes.Buffer
	if err := json.Compact(&line, body); err != nil {
		return "", err
	}
	return fmt.Sprintf("HTTP %d, weight %s, %s", response.StatusCode, response.Header.Get("X-Load-Balancing-Endpoint-Weight"), &line), nil
}

// tally is what a probe has seen so far.
type tally struct {
	mu                sync.Mutex
	answers, failures map[string]bool
	servers           map[netip.AddrPort]bool
	// last is who answered each source address last.
	last map[netip.AddrPort]netip.AddrPort
	// moved says that one source address met several endpoints.
	moved bool
}

func newTally() *tally {
	return &tally{
		answers: map[string]bool{}, failures: map[string]bool{},
		servers: map[netip.AddrPort]bool{}, last: map[netip.AddrPort]netip.AddrPort{},
	}
}

// complete says that further tries bring no news: everybody has answered, and once more,
// or in the quick round nobody.
func (t *tally) complete(p Probe, e effort) bool {
	if len(t.servers) == 0 {
		return e.round == 0
	}
	return !p.sticky && len(t.failures) == 0 && len(t.servers) == p.most
}

// add counts one try: the answer, and who gave it.
func (t *tally) add(source netip.AddrPort, answer string, at netip.AddrPort, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		t.failures[failure(err)] = true
		return
	}
	if last, ok := t.last[source]; ok && last != at {
		t.moved = true
	}
	t.last[source], t.servers[at], t.answers[answer] = at, true, true
}

// sourceName is the address that a server saw, or "its client".
func sourceName(host *netlab.Host, source, seen netip.Addr) string {
	if seen == source || seen == host.Addr.V4 || seen == host.Addr.V6 {
		return "its client"
	}
	return seen.String()
}

func failure(err error) string {
	outcome := netlab.OutcomeOf(err)
	var errno syscall.Errno
	if outcome == netlab.Failed && errors.As(err, &errno) {
		return "failed: " + errno.Error()
	}
	return outcome.String()
}

// outcome names no endpoint if there is affinity and only one source address: each lab
// chooses its own.
func (t *tally) outcome(p Probe, many bool) Outcome {
	if p.sticky && !many && len(t.answers) > 0 {
		t.answers = map[string]bool{"one endpoint answers": true}
	}
	if p.sticky && t.moved {
		t.answers["a client changes its endpoint"] = true
	}
	return append(slices.Sorted(maps.Keys(t.answers)), slices.Sorted(maps.Keys(t.failures))...)
}
