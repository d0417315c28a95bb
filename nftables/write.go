// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"signalbox/nft"
	"signalbox/nft/access"
)

// Each function of this file writes one transaction.

// writeTable writes the whole table. If old is not nil, the affinity map of the old
// table stays. Rules go before elements: when a rule is bound to a map, the kernel
// walks all elements of the map.
func writeTable(t *nft.Table, rules ruleset, st *state, old *nft.Contents) error {
	if old != nil {
		t.ReplaceContents(old, affinity)
	} else {
		t.ReplaceTable()
	}
	setCounters(t, rules, old)
	t.AddChains(rules.chains(st))
	t.AddElements(rules.NodeElements())
	buckets := make([][]nft.Element, setCount)
	st.elements = compileAll(st, func(e nft.Element) {
		buckets[e.Set] = append(buckets[e.Set], e)
		if len(buckets[e.Set]) == nft.BatchElements {
			t.AddElements(buckets[e.Set])
			buckets[e.Set] = buckets[e.Set][:0]
		}
	})
	for _, bucket := range buckets {
		t.AddElements(bucket)
	}
	return access.Commit(t)
}

// writeChange writes a change of Service ports, and of the node's facts if node is set.
func writeChange(t *nft.Table, rules ruleset, st *state, c *pendingChange, node bool) error {
	if node {
		writeNode(t, rules, st)
	}
	t.AddChains(pickChainRules(t.IPFamily, c.newChains))
	t.RemoveElements(c.Remove)
	t.AddElements(c.Add)
	for _, chain := range c.oldChains {
		t.DeleteChain(chain.name())
	}
	return access.Commit(t)
}

// writeNode replaces the rules and elements that depend on the node.
func writeNode(t *nft.Table, rules ruleset, st *state) {
	access.RewriteNodeChains(t, append(rules.nodeChains(), rules.postrouting()), st.node, rules.Node)
	rules.RewriteNodeElements(t)
}

// writeDifference completes the adoption of a table.
func writeDifference(t *nft.Table, d *tableDifference) error {
	t.AddChains(pickChainRules(t.IPFamily, d.chains))
	t.Correct(d.Difference)
	return access.Commit(t)
}
