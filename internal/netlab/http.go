// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"net"
	"net/http"
)

// Listen is net.Listen inside the host.
func (h *Host) Listen(network, addr string) (l net.Listener, err error) {
	err = h.Do(func() error {
		l, err = net.Listen(network, addr)
		return err
	})
	return l, err
}

// Dial is net.Dialer.DialContext inside the host.
func (h *Host) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.Do(func() error {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Client is an HTTP client inside the host. It keeps connections.
func (h *Host) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: h.Dial}}
}
