// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
)

// told hands what arrived at a SilentPort to the one who sent it, past the
// network.
type told struct {
	mu      sync.Mutex
	waiting map[string]chan Answer // by what was sent
}

func (t *told) expect(token string) <-chan Answer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting == nil {
		t.waiting = map[string]chan Answer{}
	}
	arrived := make(chan Answer, 1)
	t.waiting[token] = arrived
	return arrived
}

func (t *told) arrived(token string, a Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if waiting := t.waiting[token]; waiting != nil {
		waiting <- a
		delete(t.waiting, token)
	}
}

// serveSilently takes datagrams on an address and port and answers none.
func (h *Host) serveSilently(at netip.AddrPort) error {
	err := h.Do(func() error {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		h.lab.servers = append(h.lab.servers, server{func() { c.Close() }})
		go func() {
			buf := make([]byte, 512)
			for {
				n, from, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return // closed
				}
				h.lab.told.arrived(strings.TrimSpace(string(buf[:n])), Answer{Server: h.Name, At: at, Seen: unmap(from)})
			}
		}()
		return nil
	})
	if err != nil {
		return fmt.Errorf("listening on %s: %w", h.Name, err)
	}
	return nil
}

// Tell sends one datagram of a UDP flow and waits until it has arrived at a
// SilentPort.
func (c *Conn) Tell(ctx context.Context) (Answer, error) {
	token := newToken()
	arrived := c.lab.told.expect(token)
	if _, err := fmt.Fprintln(c.conn, token); err != nil {
		return Answer{}, fmt.Errorf("telling: %w", err)
	}
	select {
	case a := <-arrived:
		return a, nil
	case <-ctx.Done():
		return Answer{}, fmt.Errorf("waiting until a datagram arrives: %w", ctx.Err())
	}
}
