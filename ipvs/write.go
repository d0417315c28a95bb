// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
)

// write writes a batch and commits it to the state. IPVS has no transactions. So additions come
// first, then the rules that use them in one transaction, then addresses, then removals.
func (p *Proxier) write(st *state, b *batch) error {
	unknown := func(err error) error { return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err) }
	now := p.now()
	executed := func(o kernel.Op) { st.executed(o, now) }
	if err := p.ipvs.Send(b.additions, executed); err != nil {
		return unknown(err)
	}
	if err := p.writeTable(st, b); err != nil {
		return unknown(fmt.Errorf("write table %s: %w", tableName, err))
	}
	if err := p.device.Add(b.newAddrs, func(a netip.Addr) { st.onDevice[a] = true }); err != nil {
		return unknown(err)
	}
	if err := p.device.AwaitLocal(b.newAddrs); err != nil {
		return unknown(err)
	}
	if err := p.ipvs.Send(b.removals, executed); err != nil {
		return unknown(err)
	}
	st.commit(b, now)
	return nil
}

func (p *Proxier) writeTable(st *state, b *batch) error {
	if b.all {
		return p.replaceTable(st, b)
	}
	t, before := p.table, st.rules
	if known := len(before.timeouts); known < len(b.rules.timeouts) {
		chains := b.rules.affinityChains()
		last := len(chains) - 2
		t.AddChains(chains[known*(maxEndpointSets+1) : last])
		t.RewriteChains(chains[last:])
	} else if !b.node && len(b.Remove)+len(b.Add)+len(b.newAddrs) == 0 {
		return nil // most changes of endpoints
	}
	if b.node {
		access.RewriteNodeChains(t, append(b.rules.nodeChains(), b.rules.postrouting()), before.Node, b.rules.Node)
		b.rules.RewriteNodeElements(t)
	}
	t.RemoveElements(b.Remove)
	t.AddElements(bySet(slices.Concat(vipElements(b.newAddrs), b.Add)))
	return access.Commit(t)
}

// replaceTable writes the whole table, but keeps the map of clients.
func (p *Proxier) replaceTable(st *state, b *batch) error {
	t := p.table
	old, err := t.Inspect()
	if err != nil {
		return err
	}
	if t.HasSet(old, affinity) {
		t.ReplaceContents(old, affinity)
	} else {
		t.ReplaceTable()
	}
	t.AddChains(b.rules.chains())
	list := slices.Concat(b.rules.NodeElements(), vipElements(b.newAddrs), b.Add)
	for a := range st.onDevice {
		list = append(list, vipElement(a))
	}
	t.AddElements(bySet(list))
	return access.Commit(t)
}

func vipElement(a netip.Addr) nft.Element { return nft.Element{Set: vips, Key: addrBytes(a)} }

func vipElements(addrs []netip.Addr) (list []nft.Element) {
	for _, a := range addrs {
		list = append(list, vipElement(a))
	}
	return list
}

func bySet(list []nft.Element) []nft.Element {
	slices.SortStableFunc(list, func(a, b nft.Element) int { return cmp.Compare(a.Set, b.Set) })
	return list
}
