package nftables

import (
	"github.com/google/nftables/expr"

	"signalbox/proxier/plan"
)

// sourceChain rewrites sources to the addresses that the node's routes name. There is
// one only where they name others than masquerade takes.
const sourceChain = "new-source"

// NewSource rewrites the source to an address of this node, and the port to any.
func NewSource(n plan.Node) Statement {
	if len(n.RouteSources) == 0 {
		return masqueradeRandom()
	}
	return goTo(sourceChain)
}

// SourceChains are what NewSource goes to.
func SourceChains(f *family, n plan.Node) []Chain {
	if len(n.RouteSources) == 0 {
		return nil
	}
	var rules []rule
	for _, s := range n.RouteSources {
		match := []statement{oifname(s.Link, "", expr.CmpOpEq)}
		if s.Destination.Bits() > 0 {
			match = append(match, f.daddrIn(s.Destination, "", expr.CmpOpEq))
		}
		source := masqueradeRandom()
		if s.Source.IsValid() {
			source = f.snatRandom(s.Source)
		}
		rules = append(rules, newRule(append(match, source)...))
	}
	return []chain{{name: sourceChain, rules: append(rules, newRule(masqueradeRandom()))}}
}

// RewriteNodeChains replaces the rules of chains that depend on the node, and makes or
// removes the chain of NewSource.
func RewriteNodeChains(w *wire, chains []Chain, before, now plan.Node) {
	if len(now.RouteSources) > 0 {
		w.addChain(chain{name: sourceChain}) // one that is there stays
	}
	w.rewriteChains(chains)
	if len(before.RouteSources) > 0 && len(now.RouteSources) == 0 {
		w.deleteChain(sourceChain)
	}
}
