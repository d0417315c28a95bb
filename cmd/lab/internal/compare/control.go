// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"signalbox/internal/netlab"
)

// control connects to a Pod without a Service, again and again. A busy machine delays
// these connections as it delays the probes. So a probe is silent only if it has no answer
// when a control connection that began later has one.
type control struct {
	mu   sync.Mutex
	next chan struct{} // closed when the next connection has its answer

	stop  context.CancelFunc
	ended chan struct{}
}

const (
	// controlPause is the pause between two control connections.
	controlPause = 50 * time.Millisecond
	// controlTimeout ends one that hangs; another follows.
	controlTimeout = 10 * time.Second
)

func startControl(lab *netlab.Lab) *control {
	ctx, cancel := context.WithCancel(context.Background())
	c := &control{next: make(chan struct{}), stop: cancel, ended: make(chan struct{})}
	at := netip.AddrPortFrom(hostAddr("pod-c").V4, netlab.ControlPort)
	go func() {
		defer close(c.ended)
		c.run(ctx, func() error {
			ctx, cancel := context.WithTimeout(ctx, controlTimeout)
			defer cancel()
			_, err := lab.Host("pod-x").Ask(ctx, "tcp", netip.AddrPort{}, at)
			return err
		})
	}()
	return c
}

func (c *control) run(ctx context.Context, ask func() error) {
	for ctx.Err() == nil {
		c.mu.Lock()
		asked := c.next
		c.next = make(chan struct{})
		c.mu.Unlock()
		for ask() != nil && ctx.Err() == nil {
			pause(ctx)
		}
		close(asked)
		pause(ctx)
	}
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(controlPause):
	}
}

// later is closed when a connection that has not begun yet has its answer.
func (c *control) later() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.next
}

func (c *control) close() {
	c.stop()
	<-c.ended
}
