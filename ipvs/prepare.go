package ipvs

import (
	"log/slog"
	"net/netip"

	"signalbox/ipvs/internal/kernel"

	"signalbox/node"
)

// prepare makes the device and the kernel settings. Most works without the
// settings, so one that cannot be made is no reason to serve nothing.
func (p *Proxier) prepare() error {
	if err := p.device.Ensure(); err != nil {
		return err
	}
	p.problems = kernel.SetSysctls(p.Family, p.tuning.StrictARP)
	t := &p.tuning
	if t.TCPTimeout == 0 && t.TCPFinTimeout == 0 && t.UDPTimeout == 0 {
		return nil
	}
	return p.ipvs.SetTimeouts(t.TCPTimeout, t.TCPFinTimeout, t.UDPTimeout)
}

// KernelProblems implements proxier.Proxier, for the last Sync that wrote everything.
func (p *Proxier) KernelProblems() []*node.KernelProblem { return p.problems }

// read makes the state of what is in the kernel and this mode's: virtual
// servers at addresses of the device or with a mark of this mode, whoever made
// them; no others.
func (p *Proxier) read(rules *ruleset) (*state, error) {
	st := newState(rules)
	var err error
	if st.held, st.others, err = p.device.Addresses(); err != nil {
		return nil, err
	}
	all, err := p.ipvs.Servers()
	if err != nil {
		return nil, err
	}
	listed, err := p.ipvs.AllDestinations()
	if err != nil {
		slog.Warn("ipvs: cannot read the list of all destinations; asking for those of each virtual server, which takes longer",
			"family", p.Family.String(), "error", err)
		listed = nil
	}
	for key, scheduler := range all {
		if !isOurs(key.Mark) && !st.held[key.Addr] {
			continue
		}
		dests := listed[key]
		if len(dests) == 0 {
			if dests, err = p.ipvs.Destinations(key); err != nil {
				return nil, err
			}
		}
		s := &server{scheduler: scheduler, dests: make(map[netip.AddrPort]int, len(dests))}
		st.addServer(key, s)
		for _, d := range dests {
			s.dests[d.Addr] = d.Weight
			st.noteEndpoint(key, d.Addr)
		}
	}
	st.keepDeadlines(p.deadlines)
	return st, nil
}
