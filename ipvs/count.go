package ipvs

import "signalbox/proxier"

// Counts implements proxier.Proxier. What drains counts until it is gone.
func (p *Proxier) Counts() []proxier.KernelObjects {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts()
}

func (p *Proxier) counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	dests := 0
	for _, s := range p.state.servers {
		dests += len(s.dests)
	}
	return []proxier.KernelObjects{
		{Kind: "virtual-server", Count: len(p.state.servers)},
		{Kind: "real-server", Count: dests},
		{Kind: "address", Count: len(p.state.held)},
		{Table: tableName, Kind: "element", Count: len(p.state.uses) + len(p.state.held) + len(p.state.rules.NodeElements())},
	}
}
