// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"signalbox/internal/netlab"
	"signalbox/internal/wait"
)

// step is one line of a script.
type step struct {
	line    int
	text    string
	packets bool // it sends packets or waits
	do      func(ctx context.Context, w *world) error
}

// withoutPackets are the first words of the steps that only change what the mode
// is told, or check what is reported.
var withoutPackets = []string{"apply", "delete", "node1", "reports", "stop", "start", "synced"}

// parseScript numbers lines from first, so that messages name the file's own.
func parseScript(text string, first int) ([]step, error) {
	var steps []step
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		do, err := parseStep(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %s: %w", first+n, line, err)
		}
		steps = append(steps, step{
			line: first + n, text: line, do: do,
			packets: !slices.Contains(withoutPackets, strings.Fields(line)[0]),
		})
	}
	return steps, nil
}

func parseStep(line string) (func(context.Context, *world) error, error) {
	first, rest, _ := strings.Cut(line, " ")
	rest = strings.TrimSpace(rest)
	words := strings.Fields(rest)
	switch first {
	case "apply", "delete":
		if len(words) == 0 {
			return nil, errors.New("no file is named")
		}
		return func(ctx context.Context, w *world) error { return w.change(ctx, first == "delete", words) }, nil
	case "from":
		return parseFrom(words)
	case "open":
		return parseOpen(words)
	case "clients":
		return parseClients(words)
	case "node1":
		return parseNode(words)
	case "idle":
		d, err := time.ParseDuration(rest)
		return func(ctx context.Context, _ *world) error { return idle(ctx, d) }, err
	case "reports":
		if rest == "" {
			return nil, errors.New("no text is given")
		}
		return func(_ context.Context, w *world) error { return w.reported(rest) }, nil
	case "stop":
		return func(_ context.Context, w *world) error { return w.stop() }, nothingAfter(words)
	case "start":
		if len(words) == 1 && words[0] == "unsynced" {
			return func(ctx context.Context, w *world) error { return w.start(ctx, false) }, nil
		}
		return func(ctx context.Context, w *world) error { return w.start(ctx, true) }, nothingAfter(words)
	case "synced":
		return func(ctx context.Context, w *world) error { return w.synced(ctx) }, nothingAfter(words)
	}
	if len(words) > 0 && (words[0] == "->" || outcomeWords[words[0]] != 0) {
		return parseHeld(first, words)
	}
	return nil, errors.New("there is no such step")
}

func nothingAfter(words []string) error {
	if len(words) > 0 {
		return fmt.Errorf("what does %q mean here?", words)
	}
	return nil
}

// probe is one kind of connection.
type probe struct {
	host    string
	at      string // source address, may be empty
	network string // "tcp", "udp" or "sctp"
	target  string
}

// parseProbe reads "HOST [at SOURCE] tcp|udp|sctp TARGET" and returns what follows.
func parseProbe(words []string) (p probe, rest []string, err error) {
	if len(words) < 3 {
		return p, nil, errors.New("expected: HOST [at SOURCE] tcp|udp|sctp ADDRESS:PORT")
	}
	p.host, words = words[0], words[1:]
	if words[0] == "at" && len(words) > 3 {
		p.at, words = words[1], words[2:]
	}
	p.network, p.target = words[0], words[1]
	if !slices.Contains([]string{"tcp", "udp", "sctp"}, p.network) {
		return p, nil, fmt.Errorf("%q is none of tcp, udp and sctp", p.network)
	}
	return p, words[2:], nil
}

// expectation is what a probe must see.
type expectation struct {
	outcome outcome
	servers []string // each "host" or "host:port", where answered
	same    bool     // all connections must reach the same server
	// source is the host or address that the server must see; may be empty.
	// "same" stands for the source and port that the held connection's server
	// saw before.
	source string
}

// outcome says how connection attempts end.
type outcome string

const (
	answered outcome = "->"
	arrives  outcome = "=>"      // the datagrams of one flow arrive, and nobody answers
	refused  outcome = "refused" // a TCP reset or ICMP port unreachable
	dropped  outcome = "dropped" // nothing comes back
	// The client's own send failed with EPERM: its host dropped the datagram.
	notPermitted outcome = "not-permitted"
	unreachable  outcome = "unreachable" // another ICMP error: nobody took the packet
	unanswered   outcome = "unanswered"  // any of these four
	broken       outcome = "broken"      // an open connection was reset
)

// outcomeWords maps the words of a script to what netlab calls it. unanswered
// has no single counterpart.
var outcomeWords = map[string]netlab.Outcome{
	string(refused): netlab.Refused, string(dropped): netlab.Silent, string(unreachable): netlab.Unreachable,
	string(notPermitted): netlab.NotPermitted, string(unanswered): netlab.Failed, string(broken): netlab.Broken,
}

func (o outcome) matches(got netlab.Outcome) bool {
	switch o {
	case answered, arrives:
		return got == netlab.Answered
	case unanswered:
		return got == netlab.Refused || got == netlab.Silent || got == netlab.NotPermitted || got == netlab.Unreachable
	}
	return got == outcomeWords[string(o)]
}

func parseExpectation(words []string) (e expectation, err error) {
	if i := slices.Index(words, "source"); i >= 0 {
		if i+2 != len(words) {
			return e, errors.New("source must be followed by one host or address, at the end")
		}
		e.source, words = words[i+1], words[:i]
	}
	if len(words) == 0 {
		return e, errors.New("nothing says what must happen")
	}
	for i := range words {
		words[i] = strings.TrimSuffix(words[i], ",")
	}
	e.outcome, words = outcome(words[0]), words[1:]
	if e.outcome != answered && e.outcome != arrives {
		if _, known := outcomeWords[string(e.outcome)]; !known || e.source != "" {
			return e, fmt.Errorf("%q is not ->, refused, dropped, not-permitted, unreachable, unanswered or broken, or has a source", e.outcome)
		}
		return e, nothingAfter(words)
	}
	if len(words) > 3 && slices.Equal(words[:3], []string{"the", "same", "of"}) {
		e.same, words = true, words[3:]
	}
	if e.servers = words; len(words) == 0 {
		return e, fmt.Errorf("nobody is named after %s", e.outcome)
	}
	return e, nil
}

func parseFrom(words []string) (func(context.Context, *world) error, error) {
	p, rest, err := parseProbe(words)
	if err != nil {
		return nil, err
	}
	e, err := parseExpectation(rest)
	if e.outcome == arrives && p.network != "udp" {
		return nil, errors.New("=> is for udp")
	}
	return func(ctx context.Context, w *world) error { return w.probe(ctx, p, e) }, err
}

// parseOpen reads "NAME from PROBE EXPECTATION".
func parseOpen(words []string) (func(context.Context, *world) error, error) {
	if len(words) < 2 || words[1] != "from" {
		return nil, errors.New("expected: open NAME from PROBE EXPECTATION")
	}
	p, rest, err := parseProbe(words[2:])
	if err != nil {
		return nil, err
	}
	e, err := parseExpectation(rest)
	return func(ctx context.Context, w *world) error { return w.open(ctx, words[0], p, e) }, err
}

// parseHeld reads what a connection that was opened before must see now.
func parseHeld(name string, words []string) (func(context.Context, *world) error, error) {
	e, err := parseExpectation(words)
	return func(ctx context.Context, w *world) error { return w.held(ctx, name, e) }, err
}

// parseClients reads what many clients together must see:
//
//	clients tcp $vip1:80 -> pod-a pod-b    each stays with one, all are reached
//	clients tcp $vip1:80 stay              with whom it was before
//	clients tcp $vip1:80 stay for 3s       while it comes back all the time
//	clients tcp $vip1:80 stay except those of pod-b -> pod-a
//	clients tcp $vip1:80 move              not all are with whom they were
func parseClients(words []string) (func(context.Context, *world) error, error) {
	p, rest, err := parseProbe(append([]string{"client1"}, words...))
	if err != nil || len(rest) == 0 {
		return nil, errors.Join(err, errors.New("nothing says what must happen"))
	}
	c := crowd{probe: p, rule: rest[0]}
	rest = rest[1:]
	switch {
	case c.rule == "move" && len(rest) == 0, c.rule == "stay" && len(rest) == 0:
	case c.rule == "stay" && rest[0] == "for" && len(rest) == 2:
		c.stayFor, err = time.ParseDuration(rest[1])
	case c.rule == "stay" && len(rest) > 5 && strings.Join(rest[:3], " ") == "except those of" && rest[4] == "->":
		c.except, c.servers = rest[3], rest[5:]
	case c.rule == "->" && len(rest) > 0:
		c.servers = rest
	default:
		err = errors.New("expected -> HOSTS, stay, stay for TIME, stay except those of HOST -> HOSTS, or move")
	}
	return func(ctx context.Context, w *world) error { return c.run(ctx, w) }, err
}

// parseNode reads "gains ADDRESS [on LINK]", "loses ADDRESS" or "routes RANGE from
// ADDRESS|anywhere".
func parseNode(words []string) (func(context.Context, *world) error, error) {
	switch {
	case len(words) == 2 && words[0] == "gains":
		return func(ctx context.Context, w *world) error { return w.gain(ctx, words[1], "eth0") }, nil
	case len(words) == 4 && words[0] == "gains" && words[2] == "on":
		return func(ctx context.Context, w *world) error { return w.gain(ctx, words[1], words[3]) }, nil
	case len(words) == 2 && words[0] == "loses":
		return func(ctx context.Context, w *world) error { return w.lose(ctx, words[1]) }, nil
	case len(words) == 4 && words[0] == "routes" && words[2] == "from":
		return func(ctx context.Context, w *world) error { return w.route(ctx, words[1], words[3]) }, nil
	}
	return nil, errors.New("expected: node1 gains ADDRESS [on LINK], loses ADDRESS, or routes RANGE from ADDRESS|anywhere")
}

// idle lets time pass where the kernel's own clock is what is tested: there is
// no event to wait for, and asking would wind it up again.
func idle(ctx context.Context, d time.Duration) error {
	if !wait.For(ctx, d) {
		return ctx.Err()
	}
	return nil
}
