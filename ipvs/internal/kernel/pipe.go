package kernel

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"

	"signalbox/node"
)

const (
	// window is how many requests go to the kernel in one system call. It follows
	// them one by one within the call and answers those that it refuses, and
	// the last one, with less than 1 KiB each. So should it refuse all of a
	// window, their answers fit into the smallest receive buffer that is in
	// use, 208 KiB, and none gets lost.
	window = 128
	// answerSize is more than an answer takes, with the request in it.
	answerSize = 4096
)

// pipe sends netlink requests of one network namespace many at a time: to ask
// for, make and read an answer to each takes more time than to follow it.
type pipe struct {
	protocol int            // as of socket(2)
	ns       netns.NsHandle // netns.None() for the process's own
	conn     *netlink.Conn  // nil after an exchange that was not understood
}

// openPipe connects to the caller's network namespace.
func openPipe(protocol int) (*pipe, error) {
	ns, err := node.ForeignNamespace()
	if err != nil {
		return nil, err
	}
	p := &pipe{protocol: protocol, ns: ns}
	if err := p.open(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *pipe) open() (err error) {
	cfg := &netlink.Config{MessageBufferSize: answerSize}
	if p.ns.IsOpen() {
		cfg.NetNS = int(p.ns)
	}
	p.conn, err = netlink.Dial(p.protocol, cfg)
	return err
}

func (p *pipe) close() {
	if p.conn != nil {
		p.conn.Close()
	}
	if p.ns.IsOpen() {
		p.ns.Close()
	}
}

// send sends n requests in order and tells answered for each what the kernel said,
// nil for done; answered says whether to go on: after false, the rest of the
// window is still told and no more is sent. The error is that of the
// connection; what was not told of by then may or may not be done.
func (p *pipe) send(n int, request func(i int) netlink.Message, answered func(i int, err error) bool) error {
	part := make([]netlink.Message, 0, min(n, window))
	for first := 0; first < n; first += window {
		part = part[:0]
		for i := first; i < min(first+window, n); i++ {
			part = append(part, request(i))
		}
		on := true
		err := p.exchange(part, func(i int, err error) {
			on = answered(first+i, err) && on
		})
		if err != nil && p.conn != nil {
			p.conn.Close() // so that no late answer is taken for another's
			p.conn = nil
		}
		if err != nil || !on {
			return err
		}
	}
	return nil
}

func (p *pipe) exchange(requests []netlink.Message, answered func(i int, err error)) error {
	if p.conn == nil {
		if err := p.open(); err != nil {
			return err
		}
	}
	for i := range requests {
		requests[i].Header.Flags |= netlink.Request
	}
	requests[len(requests)-1].Header.Flags |= netlink.Acknowledge
	if err := p.conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	sent, err := p.conn.SendMessages(requests)
	if err != nil {
		return err
	}
	for next := 0; next < len(sent); next++ {
		i, refusal, err := p.answer(sent[next:])
		if err != nil {
			return err
		}
		for range i { // silence means done
			answered(next, nil)
			next++
		}
		answered(next, refusal)
	}
	return nil
}

// answer waits for the kernel's next answer to one of the requests: to the last,
// or a refusal. It returns which one that is.
func (p *pipe) answer(waiting []netlink.Message) (i int, refusal, err error) {
	messages, err := p.conn.Receive()
	var sequence uint32
	var op *netlink.OpError
	switch {
	case errors.As(err, &op) && op.Sequence != 0:
		sequence, refusal = op.Sequence, op.Err
	case err != nil:
		return 0, nil, err
	case len(messages) == 1:
		sequence = messages[0].Header.Sequence
	}
	i = slices.IndexFunc(waiting, func(m netlink.Message) bool { return m.Header.Sequence == sequence })
	if i < 0 || refusal == nil && i != len(waiting)-1 {
		return 0, nil, fmt.Errorf("netlink: a strange answer, to request %d: %v", sequence, messages)
	}
	return i, refusal, nil
}
