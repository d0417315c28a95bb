package daemon

import (
	"errors"
	"fmt"

	"signalbox/iptables"
	"signalbox/ipvs"
	"signalbox/modes"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Cleanup removes from the kernel what signalbox has put there, in every mode
// and both families, and with kubeProxy also what kube-proxy has, in each of
// its modes; nothing of anybody else's. Kernel settings (sysctls) and tracked
// connections stay, and so does the kubelet's share of the iptables rules. It
// needs no API server, only the network namespace of the node.
//
// It returns what was there and went, one text each. Whatever fails, the rest is
// removed all the same; the error names what is left and why.
func Cleanup(kubeProxy bool) (removed []string, err error) {
	todo := signalboxRemovals(modes.All)
	if kubeProxy {
		todo = append(kubeProxyRemovals("", endIPVS), todo...)
	}
	var left []error
	for _, r := range todo {
		for _, family := range plan.Families {
			some, err := r.do(family)
			if some {
				removed = append(removed, fmt.Sprintf("%s, for %s", r.what, family))
			}
			left = append(left, err)
		}
	}
	return removed, errors.Join(left...)
}

// removal takes one thing out of the kernel.
type removal struct {
	what string
	// remove says whether anything was there that went.
	remove func(plan.Family) (bool, error)
	// kubeProxy is that it was kube-proxy's.
	kubeProxy bool
}

// do returns whether anything went, and an error that names what is left. What
// this machine cannot have is not left.
func (r removal) do(family plan.Family) (removed bool, err error) {
	removed, err = r.remove(family)
	var unsupported *proxier.UnsupportedError
	var unknown *iptables.UnknownOwnerError
	switch {
	case err == nil, errors.As(err, &unsupported):
		return removed, nil
	case errors.As(err, &unknown):
		return removed, unknown // of r.what or not, as it says
	}
	return removed, fmt.Errorf("%s may be left for %s: %w", r.what, family, err)
}

// signalboxRemovals are those of modes.
func signalboxRemovals(list []modes.Mode) []removal {
	var all []removal
	for _, m := range list {
		all = append(all, removal{what: "what signalbox's mode " + m.Name + " wrote", remove: m.Cleanup})
	}
	return all
}

// kubeProxyRemovals remove what kube-proxy has written and a mode at work has
// not taken over: inUse is its variant of the iptables tools, "" in other modes.
// servers removes what is in IPVS, and comes after the iptables rules, which use
// kube-proxy's sets.
func kubeProxyRemovals(inUse iptables.Backend, servers func(plan.Family) (bool, error)) []removal {
	return []removal{
		{"kube-proxy's iptables rules", func(f plan.Family) (bool, error) { return iptables.CleanupKubeProxy(f, inUse) }, true},
		{"kube-proxy's nftables table", nftables.CleanupKubeProxy, true},
		{"kube-proxy's IPVS servers, addresses and ipsets", servers, true},
	}
}

// endIPVS removes kube-proxy's virtual servers, with their connections.
func endIPVS(f plan.Family) (removed bool, err error) {
	removed, _, err = ipvs.CleanupKubeProxy(f, false, false)
	return removed, err
}
