package nftables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// A new process reads the table that an earlier process left, finds out which numbers
// Service ports have in it, and writes only what differs from the plan.
//
// Rules are not read back one by one. An empty chain has the digest of all rules and
// set declarations in its name. If the digest is another one, because the node's facts
// or the release changed, the table is written anew.

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
	if err != nil || !p.table.HasDynamicMap(contents, affinity) {
		return existingTable{}, err
	}
	if p.state != nil {
		return existingTable{contents: contents, ports: p.state.ports}, nil
	}
	a := &adoption{Table: p.table, rules: rules, elements: make(kernelElements)}
	if err := a.read(); err != nil {
		return existingTable{}, err
	}
	old := existingTable{contents: contents, ports: make(map[plan.ServicePortName]*programmedPort)}
	for name, port := range desired.Services {
		if read := a.readPort(port); read != nil {
			old.ports[name] = read
		}
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

// elementPlace is where the kernel has an element.
type elementPlace struct {
	set      nft.SetID
	key, end string
	closes   bool // the end of an interval over one field
}

func placeOf(set nft.SetID, e *nftables.SetElement) elementPlace {
	return elementPlace{set, string(e.Key), string(e.KeyEnd), e.IntervalEnd}
}

// kernelElements are the elements of a table, except those that packets make.
type kernelElements map[elementPlace]nftables.SetElement

// datum is what the kernel has for a key.
func (k kernelElements) datum(set nft.SetID, key string) (uint32, bool) {
	e, ok := k[elementPlace{set: set, key: key}]
	if !ok || len(e.Val) != 4 {
		return 0, false
	}
	return nft.MarkOfData(e.Val), true
}

// adoption reads a table.
type adoption struct {
	*nft.Table
	rules    ruleset
	elements kernelElements
	chains   map[pickChain]uint32 // those in the kernel
	byNumber map[uint32]pickChain
}

// read reads all elements, and the pick chains with their numbers.
func (a *adoption) read() error {
	err := a.ReadAll(func(set nft.SetID, elements []nftables.SetElement) {
		for i := range elements {
			a.elements[placeOf(set, &elements[i])] = elements[i]
		}
	})
	a.chains, a.byNumber = make(map[pickChain]uint32), make(map[uint32]pickChain)
	for place, e := range a.elements {
		if place.set != pickChains || len(place.key) != 4 {
			continue
		}
		if c, ok := parseChainName(verdictChain(e.Val)); ok {
			n := binary.NativeEndian.Uint32([]byte(place.key))
			a.chains[c], a.byNumber[n] = n, c
		}
	}
	return err
}

// verdictChain is the chain that a verdict leads to.
func verdictChain(val []byte) string {
	verdict, err := netlink.NewAttributeDecoder(val)
	if err != nil {
		return ""
	}
	for verdict.Next() {
		if verdict.Type() == unix.NFTA_VERDICT_CHAIN {
			return verdict.String()
		}
	}
	return ""
}

// hasSameRules says whether the table has the rules, chains and sets that this process
// would write.
func (a *adoption) hasSameRules(old *nft.Contents) (bool, error) {
	if len(old.Sets) != len(allSets) || !slices.Contains(old.Chains, a.rules.digest()) {
		return false, nil
	}
	for _, s := range allSets {
		if !slices.ContainsFunc(old.Sets, func(found *nftables.Set) bool { return found.Name == s.Name }) {
			return false, nil
		}
	}
	chains := slices.Concat(a.rules.fixedChains(), a.rules.nodeChains(), a.rules.baseChains())
	for c, n := range a.chains {
		if c.sizeIsNumber() && n != uint32(c.size) {
			return false, nil
		}
		chains = append(chains, c.chain(a.IPFamily))
	}
	if len(old.Chains) != len(chains)+1 {
		return false, nil
	}
	// Other software may have removed or added rules.
	for _, c := range chains {
		if n, err := a.RuleCount(c.Name); err != nil || n != len(c.Rules) {
			return false, err
		}
	}
	return true, nil
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
			id, ok = a.elements.datum(sets.internal, key)
		}
		if !ok && (fe.External == set || fe.Internal == set) {
			id, ok = a.elements.datum(sets.external, key)
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
			endpoint, ok := a.elements.datum(affinitySlots, slotKey(set.firstID|uint32(i), slot))
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
	e, ok := a.elements[elementPlace{set: set, key: key}]
	if !ok || len(e.Val) != a.AddrLen+4 {
		return netip.AddrPort{}, false
	}
	addr, _ := netip.AddrFromSlice(e.Val[:a.AddrLen])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Val[a.AddrLen:])), true
}

// tableDifference is what an adopted table lacks, and what it has too much.
type tableDifference struct {
	chains      []pickChain // to make
	remove, add map[nft.SetID][]nftables.SetElement
}

// compare uses up the elements that were read.
func (a *adoption) compare(st *state) *tableDifference {
	d := &tableDifference{remove: map[nft.SetID][]nftables.SetElement{}, add: map[nft.SetID][]nftables.SetElement{}}
	for c := range st.chains {
		if _, present := a.chains[c]; !present {
			d.chains = append(d.chains, c)
		}
	}
	slices.SortFunc(d.chains, pickChain.compare)
	var wanted []nftables.SetElement
	emit := func(e nft.Element) {
		wanted = allSets[e.Set].LibraryElements(&e, wanted[:0])
		for i := range wanted {
			place := placeOf(e.Set, &wanted[i])
			if have, present := a.elements[place]; present && same(&have, &wanted[i]) {
				delete(a.elements, place)
				continue
			}
			d.add[e.Set] = append(d.add[e.Set], wanted[i])
		}
	}
	for _, e := range a.rules.NodeElements() {
		emit(e)
	}
	st.elements = compileAll(st, emit)
	for place, e := range a.elements {
		d.remove[place.set] = append(d.remove[place.set], nftables.SetElement{Key: e.Key, KeyEnd: e.KeyEnd, IntervalEnd: e.IntervalEnd})
	}
	return d
}

// same compares what was read with what would be written.
func same(have, want *nftables.SetElement) bool {
	if want.VerdictData != nil {
		return verdictChain(have.Val) == want.VerdictData.Chain
	}
	return string(have.Val) == string(want.Val) && have.Comment == want.Comment && have.IntervalOpen == want.IntervalOpen
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
