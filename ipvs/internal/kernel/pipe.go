// SPDX-License-Identifier: Apache-2.0

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
	// window is the number of requests in one system call. The kernel answers the
	// requests that it refuses, and the last one, with less than 1 KiB each. So 128
	// answers fit into the smallest usual receive buffer, 208 KiB, and none gets lost.
	window = 128
	// answerSize is more than the length of one answer, which includes the request.
	answerSize = 4096
)

// pipe sends many netlink requests in one system call. To make and read an answer for each
// request would take longer than the request itself.
type pipe struct {
	protocol int            // as of socket(2)
	ns       netns.NsHandle // netns.None() for the namespace of the process
	conn     *netlink.Conn  // nil after an answer that was not understood
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

// send sends n requests in order. It calls answered with the kernel's answer to each, which
// is nil for success. If answered returns false, send finishes the window and stops. An
// error of send concerns the connection. The kernel may have executed some of the requests
// without an answer by then.
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
			p.conn.Close() // a late answer would be taken for the answer to a later request
			p.conn = nil
		}
		if err != nil || !on {
			return err
		}
	}
	return nil
}

// exchange sends the requests of one window and reads the answers.
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
		for range i { // no answer means success
			answered(next, nil)
			next++
		}
		answered(next, refusal)
	}
	return nil
}

// answer reads the next answer: a refusal, or the success of the last request. It returns the
// index of the request.
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
		return 0, nil, fmt.Errorf("netlink: unexpected answer to request %d: %v", sequence, messages)
	}
	return i, refusal, nil
}
