// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"net/netip"

	"signalbox/proxier/plan"
)

// world has addresses of one family.
type world struct{ family plan.Family }

func (w world) addr(v4, v6 string) netip.Addr {
	if w.family == plan.IPv6 {
		return netip.MustParseAddr(v6)
	}
	return netip.MustParseAddr(v4)
}

func (w world) vip(n int) netip.Addr {
	return w.addr(fmt.Sprintf("10.96.0.%d", n), fmt.Sprintf("fd00:96::%x", n))
}

func (w world) addresses(n int) []netip.Addr {
	var list []netip.Addr
	for a := w.vip(1); len(list) < n; a = a.Next() {
		list = append(list, a)
	}
	return list
}
