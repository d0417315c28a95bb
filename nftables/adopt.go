// SPDX-License-Identifier: Apache-2.0

package nftables

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// A new process reads the table that an earlier process left, finds out which numbers
// Service ports have in it, and writes only what differs from the plan.
//
// If a rule, chain or set differs, because the node's facts or the release changed or other
// software wrote, the table is written anew.
//
// The kernel walks a map from its beginning for each page of a listing, so that the time
// grows with the square of the elements. A table of many endpoints is therefore written
// anew, which is sooner done. Of it only the numbers of Service ports with affinity are read.

// maxEndpointsRead is how many endpoints are read back. Up to about this number, a process
// that finds nothing changed is as quick as one that writes everything.
const maxEndpointsRead = 200_000

// existingTable is what the kernel has at the start.
type existingTable struct {
	contents *nft.Contents // nil if nothing of the table can stay
	// ports have the numbers that the table has for Service ports of the plan.
	ports map[plan.ServicePortName]*programmedPort
	// adopted holds the whole plan, and difference is what the table lacks of it. Both
	// are nil if the table must be written anew.
	adopted    *state
	difference *tableDifference
}

// existingTable reads nothing if this process wrote the table: it knows the numbers.
func (p *Proxier) existingTable(rules ruleset, desired *plan.Plan) (existingTable, error) {
	contents, err := p.table.Inspect()
	if err != nil || !p.table.HasSet(contents, affinity) {
		return existingTable{}, err
	}
	if p.state != nil {
		return existingTable{contents: contents, ports: p.state.ports}, nil
	}
	var except []nft.SetID
	if countEndpoints(maps.Values(desired.Services)) > p.maxEndpointsRead {
		except = []nft.SetID{endpoints}
	}
	a := &adoption{Table: p.table, rules: rules}
	if err := a.read(except...); err != nil {
		return existingTable{}, err
	}
	old := existingTable{contents: contents, ports: make(map[plan.ServicePortName]*programmedPort)}
	for name, port := range desired.Services {
		if read := a.readPort(port); read != nil {
			old.ports[name] = read
		}
	}
	if len(except) > 0 {
		return old, nil
	}
	same, err := a.hasSameRules(contents)
	if err != nil {
		return existingTable{}, err
	}
	if same {
		// A plan that cannot be numbered fails again in syncAll, which returns the error.
		if st, err := stateOf(p.IPFamily, desired, old.ports, a.chains); err == nil {
			old.adopted, old.difference = st, a.compare(st)
		}
	}
	return old, nil
}

// countEndpoints is how many elements the map of endpoints has for Service ports.
func countEndpoints(ports iter.Seq[*plan.ServicePort]) (n int) {
	for port := range ports {
		for _, set := range distinctSets(port) {
			n += len(set.Endpoints)
		}
	}
	return n
}

// datum is what the kernel has for a key.
func (a *adoption) datum(set nft.SetID, key string) (uint32, bool) {
	e, ok := a.elements.Find(set, key)
	if !ok || len(e.Val) != 4 {
		return 0, false
	}
	return nft.MarkOfData(e.Val), true
}

// adoption reads a table.
type adoption struct {
	*nft.Table
	rules    ruleset
	elements nft.KernelElements
	chains   map[pickChain]uint32 // those in the kernel
	byNumber map[uint32]pickChain
}

// read reads all elements but those of some sets, and the pick chains with their numbers.
func (a *adoption) read(except ...nft.SetID) (err error) {
	a.elements, err = a.ReadElements(except...)
	a.chains, a.byNumber = make(map[pickChain]uint32), make(map[uint32]pickChain)
	for key, chain := range a.elements.Verdicts(pickChains) {
		if c, ok := parseChainName(chain); ok && len(key) == 4 {
			n := binary.NativeEndian.Uint32([]byte(key))
			a.chains[c], a.byNumber[n] = n, c
		}
	}
	return err
}

// hasSameRules says whether the table has the rules, chains and sets that this process
// would write.
func (a *adoption) hasSameRules(old *nft.Contents) (bool, error) {
	chains := slices.Concat(a.rules.fixedChains(), a.rules.nodeChains(), a.rules.baseChains())
	for c, n := range a.chains {
		if c.sizeIsNumber() && n != uint32(c.size) {
			return false, nil
		}
		chains = append(chains, c.chain(a.IPFamily))
	}
	found, err := a.CompareChains(old, chains)
	return len(found) == 0, err
}

// readPort returns the Service port with the endpoint sets that the table knows, up to
// the first set that it does not know; nil if it knows none.
func (a *adoption) readPort(port *plan.ServicePort) *programmedPort {
	p := &programmedPort{port: &plan.ServicePort{Name: port.Name, AffinityTimeout: port.AffinityTimeout}}
	for i, set := range distinctSets(port) {
		id, ok := a.idOf(port, set)
		if !ok {
			break
		}
		read, ok := a.readSet(i, id, port.AffinityTimeout > 0)
		if !ok || i > 0 && p.sticky() && read.firstID != p.idRange {
			break
		}
		if p.sticky() {
			p.idRange = read.firstID
		}
		p.sets = append(p.sets, read)
	}
	if len(p.sets) == 0 {
		return nil
	}
	return p
}

// idOf returns the id that a frontend in the table has for the endpoint set.
func (a *adoption) idOf(port *plan.ServicePort, set *plan.EndpointSet) (uint32, bool) {
	for i := range port.Frontends {
		fe := &port.Frontends[i]
		sets, key := setsOf(fe), access.FrontendBytes(fe.Key(port.Name.Protocol))
		id, ok := uint32(0), false
		if fe.Internal == set {
			id, ok = a.datum(sets.internal, key)
		}
		if !ok && (fe.External == set || fe.Internal == set) {
			id, ok = a.datum(sets.external, key)
		}
		if ok && id >= plainFirst && id&idSpaceMask == idSpace && (id >= smallFirst) == (port.AffinityTimeout > 0) {
			return id, true
		}
	}
	return 0, false
}

// readSet reads the endpoints of the Service port's set number i, by slot.
func (a *adoption) readSet(i int, id uint32, sticky bool) (indexedSet, bool) {
	set, large := indexedSet{EndpointSet: &plan.EndpointSet{}, firstID: id &^ chainMask}, false
	if sticky {
		large = id >= largeFirst
		set.firstID = id & rangeMask(large)
	}
	c, known := a.byNumber[id&chainMask]
	if !known || c.timeout > 0 != sticky || sticky && (c.setIndex != i || c.large != large) {
		return set, false
	}
	for slot := range c.size {
		from, key := nft.SetID(endpoints), slotKey(set.firstID, slot)
		if sticky {
			endpoint, ok := a.datum(affinitySlots, slotKey(set.firstID|uint32(i), slot))
			if !ok {
				return set, false
			}
			set.numbers = append(set.numbers, endpoint&(endpointFlag(large)-1))
			from, key = affinityEndpoints+nft.SetID(i), nft.MarkKey(endpoint)
		}
		addr, ok := a.readEndpoint(from, key)
		if !ok {
			return set, false
		}
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: addr})
	}
	return set, true
}

func (a *adoption) readEndpoint(set nft.SetID, key string) (netip.AddrPort, bool) {
	e, ok := a.elements.Find(set, key)
	if !ok || len(e.Val) != a.AddrLen+4 {
		return netip.AddrPort{}, false
	}
	addr, _ := netip.AddrFromSlice(e.Val[:a.AddrLen])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Val[a.AddrLen:])), true
}

// tableDifference is what an adopted table lacks, and what it has too much.
type tableDifference struct {
	chains []pickChain // to make
	*nft.Difference
}

// compare uses up the elements that were read.
func (a *adoption) compare(st *state) *tableDifference {
	d := &tableDifference{}
	for c := range st.chains {
		if _, present := a.chains[c]; !present {
			d.chains = append(d.chains, c)
		}
	}
	slices.SortFunc(d.chains, pickChain.compare)
	d.Difference = a.Compare(a.elements, func(emit func(nft.Element)) {
		for _, e := range a.rules.NodeElements() {
			emit(e)
		}
		st.elements = compileAll(st, emit)
	})
	return d
}

// Compare implements proxier.Proxier.
func (p *Proxier) Compare(_ context.Context, about ...plan.ServicePortName) (proxier.Comparison, error) {
	if p.state == nil {
		return proxier.Comparison{}, proxier.ErrNothingWritten
	}
	rules := rulesetOf(p.IPFamily, p.mark, p.state.node)
	return access.Compare(p.table, rules.chains(p.state), func(emit func(nft.Element)) {
		for _, e := range rules.NodeElements() {
			emit(e)
		}
		compileAll(p.state, emit)
	}, about, func(name plan.ServicePortName, emit func(nft.Element)) { compile(p.state.ports[name], emit) })
}

// Repair implements proxier.Proxier. It writes elements that differ. If chains, rules or
// sets differ, or the table is too large to read, everything must be written.
func (p *Proxier) Repair(context.Context) (proxier.Difference, error) {
	if p.state == nil {
		return proxier.Difference{}, nil
	}
	contents, err := p.table.Inspect()
	if err != nil {
		return proxier.Difference{}, err
	}
	a := &adoption{Table: p.table, rules: rulesetOf(p.IPFamily, p.mark, p.state.node)}
	found, err := p.watch.CompareChains(contents, a.rules.chains(p.state))
	if err != nil || len(found) > 0 {
		return proxier.Difference{Objects: found, NeedsFullWrite: true}, err
	}
	if n := countEndpoints(p.state.servicePorts); n > p.maxEndpointsRead {
		return proxier.Difference{Objects: []string{fmt.Sprintf("elements, which are not compared among %d endpoints", n)}, NeedsFullWrite: true}, nil
	}
	if err := a.read(); err != nil {
		return proxier.Difference{}, err
	}
	d := a.compare(p.state)
	d.chains = nil // CompareChains found them
	if found = d.Texts(); len(found) == 0 {
		return proxier.Difference{}, nil
	}
	return proxier.Difference{Objects: found}, writeDifference(p.table, d)
}

// parseChainName reads what pickChain.name writes.
func parseChainName(name string) (c pickChain, ok bool) {
	rest, large := strings.CutSuffix(name, "-large")
	c.large = large
	if before, after, found := strings.Cut(rest, "-set-"); found {
		if _, err := fmt.Sscanf(after, "%d", &c.setIndex); err != nil {
			return c, false
		}
		rest = before
	}
	if before, after, found := strings.Cut(rest, "-affinity-"); found {
		seconds := 0
		if _, err := fmt.Sscanf(after, "%ds", &seconds); err != nil {
			return c, false
		}
		c.timeout, rest = time.Duration(seconds)*time.Second, before
	}
	_, err := fmt.Sscanf(rest, "pick-%d", &c.size)
	return c, err == nil && c.name() == name
}
