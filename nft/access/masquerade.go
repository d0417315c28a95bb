// SPDX-License-Identifier: Apache-2.0

package access

import (
	"signalbox/nft"
	"signalbox/proxier/plan"
)

// sourceChain rewrites sources to the addresses that the node's routes name. It exists
// only if they differ from those that masquerade takes.
const sourceChain = "new-source"

// NewSource rewrites the source to an address of this node, and the port to any.
func NewSource(n plan.Node) nft.Statement {
	if len(n.RouteSources) == 0 {
		return nft.MasqueradeRandom()
	}
	return nft.GoTo(sourceChain)
}

// SourceChains has the chain that NewSource goes to.
func SourceChains(f *nft.IPFamily, n plan.Node) []nft.Chain {
	if len(n.RouteSources) == 0 {
		return nil
	}
	var rules []nft.Rule
	for _, s := range n.RouteSources {
		match := []nft.Statement{nft.LeavesBy(s.Link)}
		if s.Destination.Bits() > 0 {
			match = append(match, f.DaddrIn(s.Destination))
		}
		source := nft.MasqueradeRandom()
		if s.Source.IsValid() {
			source = f.SNATRandom(s.Source)
		}
		rules = append(rules, nft.NewRule(append(match, source)...))
	}
	return []nft.Chain{{Name: sourceChain, Rules: append(rules, nft.NewRule(nft.MasqueradeRandom()))}}
}

// RewriteNodeChains replaces the rules of chains that depend on the node. It adds or
// removes the chain of NewSource.
func RewriteNodeChains(w *nft.Table, chains []nft.Chain, before, now plan.Node) {
	if len(now.RouteSources) > 0 {
		w.AddChain(nft.Chain{Name: sourceChain}) // an existing one stays
	}
	w.RewriteChains(chains)
	if len(before.RouteSources) > 0 && len(now.RouteSources) == 0 {
		w.DeleteChain(sourceChain)
	}
}
