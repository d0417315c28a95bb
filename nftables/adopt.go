package nftables

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
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

// A Proxier that finds its table there, from an earlier process, goes on with
// it: it reads all elements, works out which numbers the earlier process gave to
// what, and writes what differs from the plan; where nothing does, nothing.
//
// Rules are not read back one by one. An empty chain bears the digest of all
// rules and declarations in its name: where that is another one, because the
// node's facts or the release are others, the table is written anew.

// digestPrefix begins the name of the chain that holds no rules.
const digestPrefix = "written-by-"

// digest tells rulesets apart. Two with the same digest differ in nothing but
// elements and sized chains.
func (r ruleset) digest() string {
	h := sha256.New()
	for _, s := range allSets {
		h.Write([]byte(s.Text(r.IPFamily, nil)))
	}
	samples := []pickChain{{size: 2}, {size: 2, timeout: time.Second}, {size: 2, timeout: time.Second, setIndex: 1, large: true}}
	for _, c := range samples {
		h.Write([]byte(c.chain(r.IPFamily).Text()))
	}
	for _, c := range slices.Concat(r.fixedChains(), r.nodeChains(), r.baseChains()) {
		h.Write([]byte(c.Text()))
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)[:8])
}

// holding is an element of the kernel's.
type elementPlace struct {
	set      nft.SetID
	key, end string
	closes   bool // the end of an interval over one field
}

// contents are the elements of a table, but for those that packets make.
type kernelElements map[elementPlace]nftables.SetElement

func placeOf(set nft.SetID, e *nftables.SetElement) elementPlace {
	return elementPlace{set, string(e.Key), string(e.KeyEnd), e.IntervalEnd}
}

// datum is what the kernel has for a key.
func (c kernelElements) datum(set nft.SetID, key string) (uint32, bool) {
	e, ok := c[elementPlace{set: set, key: key}]
	if !ok || len(e.Val) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(e.Val), true
}

// resumption is an attempt to go on with a table.
type adoption struct {
	*nft.Table
	rules    ruleset
	elements kernelElements
	chains   map[pickChain]uint32 // those in the kernel
	byID     map[uint32]pickChain
}

// resume reads the table and says what it tells of plan's Service ports. Where
// it is a table to go on with, st is the state that holds plan, and fix what is
// to be written to get there; else st is nil.
func adopt(w *nft.Table, rules ruleset, desired *plan.Plan, old *nft.Contents) (st *state, fix *tableDifference, before map[plan.ServicePortName]*programmedPort, err error) {
	r := &adoption{Table: w, rules: rules}
	if err := r.read(); err != nil {
		return nil, nil, nil, err
	}
	r.readChains()
	before = make(map[plan.ServicePortName]*programmedPort)
	for name, port := range desired.Services {
		if rec := r.readPort(port); rec != nil {
			before[name] = rec
		}
	}
	if hasSameRules, err := r.hasSameRules(old); err != nil || !hasSameRules {
		return nil, nil, before, err
	}
	if st, err = newStateOf(w.IPFamily, desired, before, r.chains); err != nil {
		return nil, nil, before, nil // whoever writes all anew will say so
	}
	return st, r.compare(st), before, nil
}

// intact says whether the table has these very rules, chains and sets.
func (r *adoption) hasSameRules(old *nft.Contents) (bool, error) {
	if len(old.Sets) != len(allSets) || !slices.Contains(old.Chains, r.rules.digest()) {
		return false, nil
	}
	for _, s := range allSets {
		if !slices.ContainsFunc(old.Sets, func(found *nftables.Set) bool { return found.Name == s.Name }) {
			return false, nil
		}
	}
	chains := slices.Concat(r.rules.fixedChains(), r.rules.nodeChains(), r.rules.baseChains())
	for c, id := range r.chains {
		if c.sizeIsNumber() && id != uint32(c.size) {
			return false, nil
		}
		chains = append(chains, c.chain(r.IPFamily))
	}
	if len(old.Chains) != len(chains)+1 {
		return false, nil
	}
	// Somebody may have taken rules away, or put some in.
	for _, c := range chains {
		if whole, err := r.hasAllRules(c); err != nil || !whole {
			return false, err
		}
	}
	return true, nil
}

// whole says whether a chain is there with as many rules as it should have.
func (r *adoption) hasAllRules(c nft.Chain) (bool, error) {
	n, err := r.RuleCount(c.Name)
	return n == len(c.Rules), err
}

func (r *adoption) read() error {
	r.elements = make(kernelElements)
	return r.ReadAll(func(set nft.SetID, elements []nftables.SetElement) {
		for i := range elements {
			r.elements[placeOf(set, &elements[i])] = elements[i]
		}
	})
}

// readChains finds the sized chains and their numbers.
func (r *adoption) readChains() {
	r.chains, r.byID = make(map[pickChain]uint32), make(map[uint32]pickChain)
	for h, e := range r.elements {
		if h.set != pickChains || len(h.key) != 4 {
			continue
		}
		if c, ok := parseChainName(verdictChain(e.Val)); ok {
			id := binary.NativeEndian.Uint32([]byte(h.key))
			r.chains[c], r.byID[id] = id, c
		}
	}
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

// record is what the table says of a Service port: the numbers of those of its
// endpoint sets that it knows, up to the first that it does not. nil if it knows
// none.
func (r *adoption) readPort(port *plan.ServicePort) *programmedPort {
	rec := &programmedPort{port: &plan.ServicePort{Name: port.Name, AffinityTimeout: port.AffinityTimeout}}
	for i, set := range distinctSets(port) {
		id, ok := r.idOf(port, set)
		if !ok {
			break
		}
		numbered, ok := r.readSet(port, i, id)
		if !ok {
			break
		}
		if rec.idRange = numbered.firstID; i > 0 && rec.sticky() && rec.idRange != rec.sets[0].firstID {
			break
		}
		rec.sets = append(rec.sets, numbered)
	}
	if len(rec.sets) == 0 {
		return nil
	}
	rec.idRange = 0
	if rec.sticky() {
		rec.idRange = rec.sets[0].firstID
	}
	return rec
}

// idOf is the id that the table has for a set of the Service port's: that of a
// frontend that leads to it.
func (r *adoption) idOf(port *plan.ServicePort, set *plan.EndpointSet) (uint32, bool) {
	for i := range port.Frontends {
		fe := &port.Frontends[i]
		sets, key := addressedSets, access.FrontendBytes(fe.Key(port.Name.Protocol))
		if !fe.Addr.IsValid() {
			sets = nodePortSets
		}
		id, ok := uint32(0), false
		if fe.Internal == set {
			id, ok = r.elements.datum(sets.internal, key)
		}
		if !ok && (fe.External == set || fe.Internal == set) {
			id, ok = r.elements.datum(sets.external, key)
		}
		if ok && id >= plainFirst && id&idSpaceMask == idSpace && (id >= smallFirst) == (port.AffinityTimeout > 0) {
			return id, true
		}
	}
	return 0, false
}

// numberedSet reads the endpoints of the set with an id, by slot.
func (r *adoption) readSet(port *plan.ServicePort, i int, id uint32) (indexedSet, bool) {
	c, known := r.byID[id&chainMask]
	if !known || c.timeout > 0 != (port.AffinityTimeout > 0) {
		return indexedSet{}, false
	}
	if port.AffinityTimeout > 0 {
		return r.readStickySet(i, id, c)
	}
	set := indexedSet{EndpointSet: &plan.EndpointSet{}, firstID: id &^ chainMask}
	for slot := range c.size {
		addr, ok := r.readEndpoint(endpoints, slotKey(set.firstID, slot))
		if !ok {
			return indexedSet{}, false
		}
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: addr})
	}
	return set, true
}

func (r *adoption) readStickySet(i int, id uint32, c pickChain) (indexedSet, bool) {
	large := id >= largeFirst
	set := indexedSet{EndpointSet: &plan.EndpointSet{}, firstID: id & rangeMask(large)}
	if c.setIndex != i || c.large != large {
		return set, false
	}
	for slot := range c.size {
		number, ok := r.elements.datum(affinitySlots, slotKey(set.firstID|uint32(i), slot))
		if !ok {
			return set, false
		}
		addr, ok := r.readEndpoint(affinityEndpoints+nft.SetID(i), nft.MarkKey(number))
		if !ok {
			return set, false
		}
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: addr})
		set.numbers = append(set.numbers, number&(endpointFlag(large)-1))
	}
	return set, true
}

// addr reads an endpoint.
func (r *adoption) readEndpoint(set nft.SetID, key string) (netip.AddrPort, bool) {
	e, ok := r.elements[elementPlace{set: set, key: key}]
	if !ok || len(e.Val) != r.AddrLen+4 {
		return netip.AddrPort{}, false
	}
	addr, _ := netip.AddrFromSlice(e.Val[:r.AddrLen])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Val[r.AddrLen:])), true
}

// repair is what makes a table that was found the one that is wanted.
type tableDifference struct {
	chains      []pickChain // to make
	remove, add map[nft.SetID][]nftables.SetElement
	elements    int // that the table holds then, but for clients with affinity
}

// compare finds what is missing and what is too much. It uses up what was read.
func (r *adoption) compare(st *state) *tableDifference {
	p := &tableDifference{remove: map[nft.SetID][]nftables.SetElement{}, add: map[nft.SetID][]nftables.SetElement{}}
	for c := range st.chains {
		if _, there := r.chains[c]; !there {
			p.chains = append(p.chains, c)
		}
	}
	slices.SortFunc(p.chains, pickChain.compare)
	var wanted []nftables.SetElement
	emit := func(e nft.Element) {
		p.elements++
		wanted = allSets[e.Set].LibraryElements(&e, wanted[:0])
		for i := range wanted {
			h := placeOf(e.Set, &wanted[i])
			if have, there := r.elements[h]; there && same(&have, &wanted[i]) {
				delete(r.elements, h)
				continue
			}
			p.add[e.Set] = append(p.add[e.Set], wanted[i])
		}
	}
	for _, e := range r.rules.NodeElements() {
		emit(e)
	}
	st.elements = st.emitAll(emit)
	for h, e := range r.elements {
		p.remove[h.set] = append(p.remove[h.set], nftables.SetElement{Key: e.Key, KeyEnd: e.KeyEnd, IntervalEnd: e.IntervalEnd})
	}
	return p
}

// same compares what was read with what would be written.
func same(have, want *nftables.SetElement) bool {
	if want.VerdictData != nil {
		return verdictChain(have.Val) == want.VerdictData.Chain
	}
	return string(have.Val) == string(want.Val) && have.Comment == want.Comment && have.IntervalOpen == want.IntervalOpen
}

// writeRepair writes a repair in one transaction.
func writeTableDifference(w *nft.Table, p *tableDifference) error {
	chains := make([]nft.Chain, len(p.chains))
	for i, c := range p.chains {
		chains[i] = c.chain(w.IPFamily)
	}
	w.AddChains(chains)
	for set := range setCount {
		w.RemoveRead(set, p.remove[set])
	}
	for set := range setCount {
		w.AddRead(set, p.add[set])
	}
	return access.Commit(w)
}

// parseChainName reads what sizedChain.name writes.
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
