// SPDX-License-Identifier: Apache-2.0

// Package modes lists the ways in which signalbox can serve Services, so that
// the daemon, the renderer, the demo and the contract suite know the same ones.
package modes

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"signalbox/iptables"
	"signalbox/ipvs"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/userspace"
)

// All lists the modes, the preferred one first. No other product code names a mode.
var All = []proxier.Mode{nftables.Dataplane{}, iptables.Dataplane{}, ipvs.Dataplane{}, userspace.Dataplane{}}

// Auto stands for the first automatic mode that works on this node.
const Auto = "auto"

// OfKubeProxy is the mode that kube-proxy takes where nothing names one.
const OfKubeProxy = iptables.Mode

// Names lists what --mode takes.
func Names() []string {
	names := []string{Auto}
	for _, m := range All {
		names = append(names, m.Name())
	}
	return names
}

// AutomaticNames lists the modes that Auto may take, for a sentence.
func AutomaticNames() string {
	var names []string
	for _, m := range All {
		if m.Traits().Automatic {
			names = append(names, m.Name())
		}
	}
	return strings.Join(names, " and ")
}

// Named finds a mode by its name.
func Named(name string) (proxier.Mode, error) {
	i := slices.IndexFunc(All, func(m proxier.Mode) bool { return m.Name() == name })
	if i < 0 {
		return nil, fmt.Errorf("there is no mode %q; there are %s", name, strings.Join(Names()[1:], ", "))
	}
	return All[i], nil
}

// TraitsOf returns the traits of the mode with a name. They are the zero value for
// Auto, and for a name that no mode has.
func TraitsOf(name string) proxier.Traits {
	m, err := Named(name)
	if err != nil {
		return proxier.Traits{}
	}
	return m.Traits()
}

// Choice is a mode and the families that it can serve on this machine.
type Choice struct {
	Mode     proxier.Mode
	Families []plan.Family
	// Lost says for each wanted family that cannot be served why not.
	Lost map[plan.Family]error
}

// candidates are the modes that a name stands for.
func candidates(name string) ([]proxier.Mode, error) {
	if name == Auto {
		return slices.DeleteFunc(slices.Clone(All), func(m proxier.Mode) bool { return !m.Traits().Automatic }), nil
	}
	m, err := Named(name)
	return []proxier.Mode{m}, err
}

// Choose returns the named mode, or for Auto the first automatic one that can
// serve all of the wanted families, else the first that can serve one of them.
// The error names what every candidate lacks.
func Choose(name string, wanted []plan.Family) (Choice, error) {
	list, err := candidates(name)
	if err != nil {
		return Choice{}, err
	}
	var best Choice
	var lacks []error
	for _, m := range list {
		c := Choice{Mode: m, Lost: map[plan.Family]error{}}
		for _, family := range wanted {
			if err := m.Supported(family); err != nil {
				c.Lost[family] = err
				lacks = append(lacks, err)
			} else {
				c.Families = append(c.Families, family)
			}
		}
		if len(c.Families) > len(best.Families) {
			best = c
		}
	}
	if len(best.Families) == 0 {
		return Choice{}, fmt.Errorf("no mode works on this machine: %w", errors.Join(lacks...))
	}
	return best, nil
}
