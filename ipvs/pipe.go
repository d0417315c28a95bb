package ipvs

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
)

const (
	// window is how many requests are on their way at a time. The kernel follows
	// them within sendmsg and queues an answer of less than 1 KiB for each; so
	// those of a window fit into the smallest receive buffer that is in use,
	// 208 KiB, and none gets lost.
	window = 128
	// answerSize is more than an answer takes, with the request in it.
	answerSize = 4096
)

// pipe sends netlink requests of one network namespace many at a time: to wait
// for the answer to each before the next one is sent takes most of the time
// that changing many things takes.
type pipe struct {
	protocol int // as of socket(2)
	ns       netns.NsHandle
	conn     *netlink.Conn // nil after an exchange that was not understood
}

// openPipe connects to the caller's network namespace.
func openPipe(protocol int) (*pipe, error) {
	ns, err := netns.Get()
	if err != nil {
		return nil, err
	}
	p := &pipe{protocol: protocol, ns: ns}
	if err := p.open(); err != nil {
		ns.Close()
		return nil, err
	}
	return p, nil
}

func (p *pipe) open() (err error) {
	p.conn, err = netlink.Dial(p.protocol, &netlink.Config{NetNS: int(p.ns), MessageBufferSize: answerSize})
	return err
}

func (p *pipe) close() {
	if p.conn != nil {
		p.conn.Close()
	}
	p.ns.Close()
}

// send sends requests in order and hands the kernel's answer to each, nil for
// done, to answered, which says whether to go on: after false, what is on its
// way is still answered and no more is sent. The error is that of the
// connection; what was not answered by then may or may not be done.
func (p *pipe) send(requests []netlink.Message, answered func(i int, err error) bool) error {
	first := 0
	for part := range slices.Chunk(requests, window) {
		on := true
		err := p.exchange(part, func(i int, err error) {
			on = answered(first+i, err) && on
		})
		if err != nil {
			p.conn.Close() // so that no late answer is taken for another's
			p.conn = nil
		}
		if err != nil || !on {
			return err
		}
		first += len(part)
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
		requests[i].Header.Flags |= netlink.Request | netlink.Acknowledge
	}
	if err := p.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	sent, err := p.conn.SendMessages(requests)
	if err != nil {
		return err
	}
	for i := range sent {
		refusal, err := p.answer(sent[i].Header.Sequence)
		if err != nil {
			return err
		}
		answered(i, refusal)
	}
	return nil
}

// answer waits for the kernel's answer to one request, a refusal or nil.
func (p *pipe) answer(sequence uint32) (refusal, err error) {
	messages, err := p.conn.Receive()
	var op *netlink.OpError
	switch {
	case errors.As(err, &op) && op.Sequence == sequence:
		return op.Err, nil
	case err != nil:
		return nil, err
	case len(messages) != 1 || messages[0].Header.Sequence != sequence:
		return nil, fmt.Errorf("netlink: request %d was answered by %v", sequence, messages)
	}
	return nil, nil
}
