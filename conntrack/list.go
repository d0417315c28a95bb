// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink"

	"signalbox/proxier/plan"
)

// Flow is a tracked connection.
type Flow struct {
	// Client connects to Frontend.
	Client, Frontend netip.AddrPort
	// Endpoint answers, and sees Source as its client. Without translation they are
	// Frontend and Client.
	Endpoint, Source netip.AddrPort
}

// List calls fn with each tracked connection of a family and a protocol in the calling
// thread's network namespace. Some may be missing in a table that changes fast.
func List(family plan.Family, protocol plan.Protocol, fn func(Flow)) error {
	t, err := openTable()
	if err != nil {
		return err
	}
	defer t.close()
	err = t.each(family, protocol, func(f *flow) { fn(Flow{f.client, f.to, f.from, f.source}) })
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil
	}
	return err
}
