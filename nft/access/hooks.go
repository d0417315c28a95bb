package access

import (
	"github.com/google/nftables"

	"signalbox/nft"
)

// The hooks at which Services are handled. The priorities are those that kube-proxy
// documents, so that other software's chains keep their place before or after. Other
// modes than nftables rewrite destinations at priorities of their own.
//
// NATPrerouting and NATOutput come one later than kube-proxy's. While rules of
// kube-proxy are there too, kube-proxy's choose the endpoint, because nobody may keep
// this table up to date. At equal priorities the kernel runs the newest chain first.
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
