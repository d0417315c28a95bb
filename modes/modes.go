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

// Mode is one dataplane.
type Mode struct {
	Name string
	// Automatic says that "auto" may take the mode; others only serve those who
	// ask for them by name.
	Automatic bool
	// Supported says why the mode cannot serve a family on this machine, or
	// returns nil. The error is a *proxier.UnsupportedError.
	Supported func(plan.Family) error
	// New makes the mode work in the network namespace of the calling thread.
	New func(proxier.Options) (proxier.Proxier, error)
	// Init does beforehand what New's Proxier needs more than CAP_NET_ADMIN
	// for; nil where that is nothing. localhost says whether NodePorts are
	// served on the loopback address.
	Init func(o proxier.Options, localhost bool) error
	// Render writes what New's Proxier would put into the kernel for a plan,
	// in the words in which the kernel's own tool for it lists rules.
	Render func(proxier.Options, *plan.Plan) (string, error)
	// Cleanup removes everything that the mode ever put into the kernel, and says
	// whether anything was there that went, also where it fails for the rest.
	Cleanup func(plan.Family) (removed bool, err error)
	// FullAffinityLists counts the endpoints for which the kernel keeps no more
	// clients with session affinity; nil where nothing bounds these.
	FullAffinityLists func() (int, error)
}

// All lists the modes, the preferred one first.
var All = []Mode{
	{
		Name:      nftables.Mode,
		Automatic: true,
		Supported: nftables.Supported,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return nftables.New(o) },
		Render:    func(o proxier.Options, p *plan.Plan) (string, error) { return nftables.Render(o, p), nil },
		Cleanup:   nftables.Cleanup,
	},
	{
		Name:      iptables.Mode,
		Automatic: true,
		Supported: iptables.Supported,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return iptables.New(o) },
		Init:      iptables.Init,
		Render:    iptables.Render,
		Cleanup:   iptables.Cleanup,

		FullAffinityLists: iptables.FullAffinityLists,
	},
	{
		Name:      ipvs.Mode,
		Supported: ipvs.Supported,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return ipvs.New(o) },
		Init:      func(o proxier.Options, _ bool) error { return ipvs.Init(o) },
		Render:    func(o proxier.Options, p *plan.Plan) (string, error) { return ipvs.Render(o, p), nil },
		Cleanup:   ipvs.Cleanup,
	},
	{
		Name:      userspace.Mode,
		Supported: userspace.Supported,
		New:       func(o proxier.Options) (proxier.Proxier, error) { return userspace.New(o) },
		Render:    userspace.Render,
		Cleanup:   userspace.Cleanup,
	},
}

// Named finds a mode by its name.
func Named(name string) (Mode, error) {
	i := slices.IndexFunc(All, func(m Mode) bool { return m.Name == name })
	if i < 0 {
		names := make([]string, len(All))
		for i, m := range All {
			names[i] = m.Name
		}
		return Mode{}, fmt.Errorf("there is no mode %q; there are %s", name, strings.Join(names, ", "))
	}
	return All[i], nil
}

// Choice is a mode and the families that it can serve on this machine.
type Choice struct {
	Mode     Mode
	Families []plan.Family
	// Lost says for each wanted family that cannot be served why not.
	Lost []error
}

// candidates are the modes that a name stands for.
func candidates(name string) ([]Mode, error) {
	if name == "auto" {
		return slices.DeleteFunc(slices.Clone(All), func(m Mode) bool { return !m.Automatic }), nil
	}
	m, err := Named(name)
	return []Mode{m}, err
}

// Choose returns the named mode, or for "auto" the first automatic one that can
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
		c := Choice{Mode: m}
		for _, family := range wanted {
			if err := m.Supported(family); err != nil {
				c.Lost = append(c.Lost, err)
			} else {
				c.Families = append(c.Families, family)
			}
		}
		lacks = append(lacks, c.Lost...)
		if len(c.Families) > len(best.Families) {
			best = c
		}
	}
	if len(best.Families) == 0 {
		return Choice{}, fmt.Errorf("no mode works on this machine: %w", errors.Join(lacks...))
	}
	return best, nil
}
