package nftables

import (
	"signalbox/proxier"
)

// size is how much the table holds.
type size struct {
	chains, rules int
	elements      int // that do not depend on the node
	nodeElements  int
}

// sizeOf is the size of a table into which that many elements were written.
func sizeOf(rules ruleset, st *state, elements int) (n size) {
	n.countRules(rules, st)
	n.elements = elements - n.nodeElements
	return n
}

func (n *size) countRules(rules ruleset, st *state) {
	n.chains, n.rules, n.nodeElements = 0, 0, 0
	for _, c := range rules.chains(st) {
		n.chains++
		n.rules += len(c.Rules)
	}
	n.nodeElements = len(rules.NodeElements())
}

// change counts what was written.
func (n *size) change(rules ruleset, s *stage, node bool) {
	n.elements += len(s.add) - len(s.remove)
	if node || len(s.newChains)+len(s.oldChains) > 0 {
		n.countRules(rules, s.state)
	}
}

// Counts implements proxier.Proxier. The clients that session affinity
// remembers are not counted.
func (p *Proxier) Counts() []proxier.KernelObjects {
	if p.state == nil {
		return nil
	}
	return []proxier.KernelObjects{
		{Table: tableName, Kind: "chain", Count: p.size.chains},
		{Table: tableName, Kind: "rule", Count: p.size.rules},
		{Table: tableName, Kind: "element", Count: p.size.elements + p.size.nodeElements},
	}
}
