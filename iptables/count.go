package iptables

import "signalbox/proxier"

// counts are numbers of rules by table.
type counts [tableCount]int

func (c *counts) add(other counts) {
	for t := range c {
		c[t] += other[t]
	}
}

// replace counts after in the place of before.
func (c *counts) replace(before, after counts) {
	for t := range c {
		c[t] += after[t] - before[t]
	}
}

// size is how many rules the program's own chains have.
func (p *program) size() (n counts) {
	for t := range p.chains {
		for _, c := range p.chains[t] {
			n[t] += len(c.rules)
		}
	}
	return n
}

// Counts implements proxier.Proxier.
func (p *Proxier) Counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	total := p.state.own
	for t := range tableCount {
		for _, c := range p.state.frame[t] {
			total[t] += len(c.rules)
		}
	}
	for _, t := range p.state.trees {
		total[t.table] += t.rules
	}
	for _, j := range jumps {
		total[j.table]++
	}
	var out []proxier.KernelObjects
	for t := range tableCount {
		out = append(out, proxier.KernelObjects{Table: t.String(), Kind: "rule", Count: total[t], Written: p.written[t]})
	}
	return out
}
