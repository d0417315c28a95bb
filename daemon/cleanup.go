package daemon

import (
	"errors"
	"fmt"

	"signalbox/kubeproxy"
	"signalbox/modes"
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
	todo := signalboxRemovals(modes.All, false)
	if kubeProxy {
		todo = append(kubeProxyRemovals(proxier.TakenOver{}, false), todo...)
	}
	var left []error
	for _, r := range todo {
		for _, family := range plan.Families {
			some, _, err := r.do(family)
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
	// owner is whose it is.
	owner string
	// remove has the results of proxier.Mode's Cleanup.
	remove func(plan.Family) (removed bool, draining int, err error)
	// kubeProxy is that it was kube-proxy's.
	kubeProxy bool
}

// do returns whether anything went, how much waits for the end of its connections,
// and an error that names what is left. What this machine cannot have is not left.
func (r removal) do(family plan.Family) (removed bool, draining int, err error) {
	removed, draining, err = r.remove(family)
	var unsupported *proxier.UnsupportedError
	switch {
	case err == nil, errors.As(err, &unsupported):
		return removed, draining, nil
	case errors.Is(err, proxier.ErrUnknownOwner):
		return removed, draining, err // of r.what or not, as it says
	}
	return removed, draining, fmt.Errorf("%s may be left for %s: %w", r.what, family, err)
}

// signalboxRemovals are those of modes.
func signalboxRemovals(list []proxier.Mode, drain bool) []removal {
	var all []removal
	for _, m := range list {
		all = append(all, removal{
			what: "what signalbox's mode " + m.Name() + " wrote", owner: "the " + m.Name() + " mode",
			remove: func(f plan.Family) (bool, int, error) { return m.Cleanup(f, drain) },
		})
	}
	return all
}

// kubeProxyRemovals remove what kube-proxy has written and a mode at work has not
// taken over.
func kubeProxyRemovals(taken proxier.TakenOver, drain bool) []removal {
	var all []removal
	for _, r := range kubeproxy.Remnants() {
		all = append(all, removal{
			what: r.What, owner: "kube-proxy", kubeProxy: true,
			remove: func(f plan.Family) (bool, int, error) { return r.Remove(f, taken, drain) },
		})
	}
	return all
}
