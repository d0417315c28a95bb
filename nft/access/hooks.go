// SPDX-License-Identifier: Apache-2.0

package access

import (
	"github.com/google/nftables"

	"signalbox/nft"
)

// The hooks at which Services are handled. kube-proxy documents these priorities, so
// other software's chains keep their place before or after. Modes other than nftables
// rewrite destinations at other priorities.
//
// NATPrerouting and NATOutput come one later than kube-proxy's. While the node has rules
// of kube-proxy too, those choose the endpoint, because this table may be out of date.
// At equal priorities the kernel runs the newest chain first.
var (
	PreDNATPrerouting = nft.NewHook(nftables.ChainHookPrerouting, -110, "type filter hook prerouting priority dstnat - 10")
	PreDNATOutput     = nft.NewHook(nftables.ChainHookOutput, -110, "type filter hook output priority -110")
	FilterInput       = nft.NewHook(nftables.ChainHookInput, 0, "type filter hook input priority filter")
	FilterForward     = nft.NewHook(nftables.ChainHookForward, 0, "type filter hook forward priority filter")
	FilterOutput      = nft.NewHook(nftables.ChainHookOutput, 0, "type filter hook output priority filter")
	NATPrerouting     = nft.NewNATHook(nftables.ChainHookPrerouting, -99, "type nat hook prerouting priority dstnat + 1")
	NATOutput         = nft.NewNATHook(nftables.ChainHookOutput, -99, "type nat hook output priority -99")
	NATPostrouting    = nft.NewNATHook(nftables.ChainHookPostrouting, 100, "type nat hook postrouting priority srcnat")
)
