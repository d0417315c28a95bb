package nft

import (
	nflib "github.com/google/nftables"
)

// chain is one chain with its rules.
type Chain struct {
	Name  string
	Hook  *Hook // nil for a chain that is only jumped to
	Rules []Rule
}

// hook binds a base chain. The priorities are those that kube-proxy documents,
// so that other software's chains keep their place before or after. The two that
// send to endpoints are one later: where rules of a kube-proxy are there too,
// which is before they are removed and after kube-proxy has taken the node back,
// its endpoints are taken and not those of a table that nobody keeps up to date.
// (At one priority the chain that was made last would come first.)
type Hook struct {
	kind     nflib.ChainType
	num      *nflib.ChainHook
	priority nflib.ChainPriority
	text     string // as nft writes it
}

var (
	PreDNATPrerouting = &Hook{nflib.ChainTypeFilter, nflib.ChainHookPrerouting, -110, "type filter hook prerouting priority dstnat - 10"}
	PreDNATOutput     = &Hook{nflib.ChainTypeFilter, nflib.ChainHookOutput, -110, "type filter hook output priority -110"}
	FilterInput       = &Hook{nflib.ChainTypeFilter, nflib.ChainHookInput, 0, "type filter hook input priority filter"}
	FilterForward     = &Hook{nflib.ChainTypeFilter, nflib.ChainHookForward, 0, "type filter hook forward priority filter"}
	FilterOutput      = &Hook{nflib.ChainTypeFilter, nflib.ChainHookOutput, 0, "type filter hook output priority filter"}
	NatPrerouting     = &Hook{nflib.ChainTypeNAT, nflib.ChainHookPrerouting, -99, "type nat hook prerouting priority dstnat + 1"}
	NatOutput         = &Hook{nflib.ChainTypeNAT, nflib.ChainHookOutput, -99, "type nat hook output priority -99"}
	NatPostrouting    = &Hook{nflib.ChainTypeNAT, nflib.ChainHookPostrouting, 100, "type nat hook postrouting priority srcnat"}
)
