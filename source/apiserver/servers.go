// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Servers knows the addresses and ports to which a client connects: those of the API
// server, or of a proxy in front of it (HTTPS_PROXY).
type Servers struct {
	mu     sync.Mutex // guards what follows
	name   string     // host and port whose addresses are latest
	latest []netip.AddrPort
	follow func([]netip.AddrPort)
}

// Follow calls fn with the addresses that are known, and before each connection to
// others with all that the name has then.
func (s *Servers) Follow(fn func([]netip.AddrPort)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.follow = fn
	if len(s.latest) > 0 {
		fn(s.latest)
	}
}

// connectTimeout and keepAlive are those of client-go, which uses this dialer in place of
// its own.
const (
	connectTimeout = 30 * time.Second
	keepAlive      = 30 * time.Second
)

// dial connects to the host and port of a URL. A name may have other addresses each time.
// If no DNS server answers, dial tries the addresses that the name had last: a Service can
// take the address and port of the node's DNS server.
func (s *Servers) dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: connectTimeout, KeepAlive: keepAlive}
	err := s.resolve(ctx, address)
	if err == nil {
		return d.DialContext(ctx, network, address)
	}
	failed := []error{err}
	for _, at := range s.lastOf(address) {
		conn, err := d.DialContext(ctx, network, at.String())
		if err == nil {
			return conn, nil
		}
		failed = append(failed, err)
	}
	return nil, errors.Join(failed...)
}

// lastOf returns the addresses that a name had at the last successful lookup.
func (s *Servers) lastOf(name string) []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.name != name {
		return nil
	}
	return s.latest
}

func (s *Servers) resolve(ctx context.Context, address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return err
	}
	servers := make([]netip.AddrPort, len(addrs))
	for i, a := range addrs {
		servers[i] = netip.AddrPortFrom(a.Unmap().WithZone(""), uint16(number))
	}
	slices.SortFunc(servers, netip.AddrPort.Compare)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.name = address
	if !slices.Equal(s.latest, servers) {
		s.latest = servers
		if s.follow != nil {
			s.follow(servers)
		}
	}
	return nil
}
