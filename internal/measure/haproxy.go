// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"fmt"
	"net/netip"
	"strings"
)

// HAProxyConfig is a configuration of haproxy in tcp mode, with splicing, that relays
// connections to each key's address to its value.
func HAProxyConfig(relays map[netip.AddrPort]netip.AddrPort) []byte {
	var b strings.Builder
	b.WriteString(`
global
	maxconn 4000
defaults
	mode tcp
	option splice-auto
	timeout connect 10s
	timeout client 1m
	timeout server 1m
`)
	for from, to := range relays {
		fmt.Fprintf(&b, "listen at-%s-%d\n\tbind %s\n\tserver one %s\n", from.Addr(), from.Port(), from, to)
	}
	return []byte(b.String())
}
