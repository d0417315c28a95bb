package compare

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"signalbox/internal/netlab"
)

// effort says how hard a probe is tried.
type effort struct {
	// timeout is for one connection. Linux does not tell a TCP socket that is still in
	// connect(2) about an ICMP error; it tells after the second SYN, a second later.
	timeout time.Duration
	// quiet is the number of tries without news that end a probe, and per further
	// endpoint.
	quiet, perEndpoint int
	// failures end a probe, also if some tries were answered, and half of them if none was:
	// silence takes time. If half of the endpoints are silent, 16 tries miss the others in
	// one of 65,536 probes; three tries missed them in one of eight.
	failures int
	// round picks the source addresses of the clients that have many.
	round int
	// parallel is how many probes run at once in a lab.
	parallel int
}

// Rounds of a comparison: a quick one, and three to confirm each difference.
var (
	quick   = effort{timeout: 1600 * time.Millisecond, quiet: 2, perEndpoint: 3, failures: 3, parallel: 256}
	careful = effort{timeout: 2400 * time.Millisecond, quiet: 6, perEndpoint: 8, failures: 32, parallel: 256}
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

// askAll runs probes in a lab. The outcomes are in the order of the probes. With
// affinity, the addresses of a Service share a client's endpoint, so a client tries one
// after the other.
func askAll(ctx context.Context, lab *netlab.Lab, probes []Probe, e effort) []Outcome {
	outcomes := make([]Outcome, len(probes))
	slots := make(chan struct{}, e.parallel)
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
			slots <- struct{}{}
			defer func() { <-slots }()
			outcomes[i] = ask(ctx, lab.Host(p.Client), p, e)
		})
	}
	all.Wait()
	return outcomes
}

// tally is what a probe has seen so far.
type tally struct {
	answers, failures map[string]bool
	servers           map[netip.AddrPort]bool
	// last is who answered each source address last.
	last map[netip.Addr]netip.AddrPort
	// failed counts the tries that failed.
	failed int
	// moved says that one source address met several endpoints.
	moved bool
}

// ask tries a probe until it brings no news.
func ask(ctx context.Context, host *netlab.Host, p Probe, e effort) Outcome {
	t := tally{answers: map[string]bool{}, failures: map[string]bool{}, servers: map[netip.AddrPort]bool{}, last: map[netip.Addr]netip.AddrPort{}}
	sources := e.sources(p)
	patience := e.quiet + e.perEndpoint*p.most
	if len(sources) > 1 {
		patience = 2 * len(sources)
	}
	for try, quiet := 0, 0; quiet < patience && ctx.Err() == nil; try++ {
		before := len(t.answers) + len(t.failures)
		t.try(ctx, host, p, e, sources[try%len(sources)])
		if quiet++; len(t.answers)+len(t.failures) > before {
			quiet = 0
		}
		if t.failed == e.failures || t.complete(p, e, try+1) {
			break
		}
	}
	return t.outcome(p, len(sources) > 1)
}

// complete says that further tries bring no news: nobody answers, or everybody has, and
// once more.
func (t *tally) complete(p Probe, e effort, tries int) bool {
	if len(t.servers) == 0 {
		return tries >= e.failures/2
	}
	return !p.sticky && len(t.failures) == 0 && len(t.servers) == p.most && tries > p.most
}

func (t *tally) try(ctx context.Context, host *netlab.Host, p Probe, e effort, source netip.AddrPort) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	a, err := host.Ask(ctx, p.Network, source, p.Target)
	if err != nil {
		t.failures[failure(err)] = true
		t.failed++
		return
	}
	if last, ok := t.last[source.Addr()]; ok && last != a.At {
		t.moved = true
	}
	t.last[source.Addr()], t.servers[a.At] = a.At, true
	t.answers[fmt.Sprintf("%s %s sees %s", a.Server, a.At, sourceName(host, source.Addr(), a.Seen.Addr()))] = true
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
