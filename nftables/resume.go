package nftables

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	nflib "github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

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
	for _, s := range schemas {
		h.Write([]byte(s.text(r.family, nil)))
	}
	samples := []sizedChain{{size: 2}, {size: 2, timeout: time.Second}, {size: 2, timeout: time.Second, variant: 1, large: true}}
	for _, c := range samples {
		h.Write([]byte(c.chain(r.family).text()))
	}
	for _, c := range slices.Concat(r.fixedChains(), r.nodeChains(), r.baseChains()) {
		h.Write([]byte(c.text()))
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)[:8])
}

// holding is an element of the kernel's.
type holding struct {
	set      setID
	key, end string
	closes   bool // the end of an interval over one field
}

// contents are the elements of a table, but for those that packets make.
type contents map[holding]nflib.SetElement

func holdingOf(set setID, e *nflib.SetElement) holding {
	return holding{set, string(e.Key), string(e.KeyEnd), e.IntervalEnd}
}

// datum is what the kernel has for a key.
func (c contents) datum(set setID, key string) (uint32, bool) {
	e, ok := c[holding{set: set, key: key}]
	if !ok || len(e.Val) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(e.Val), true
}

// resumption is an attempt to go on with a table.
type resumption struct {
	*wire
	rules  ruleset
	held   contents
	chains map[sizedChain]uint32 // those in the kernel
	byID   map[uint32]sizedChain
}

// resume reads the table and says what it tells of plan's Service ports. Where
// it is a table to go on with, st is the state that holds plan, and fix what is
// to be written to get there; else st is nil.
func resume(w *wire, rules ruleset, desired *plan.Plan, old *legacy) (st *state, fix *repair, before map[plan.ServicePortName]*record, err error) {
	r := &resumption{wire: w, rules: rules}
	if err := r.read(); err != nil {
		return nil, nil, nil, err
	}
	r.readChains()
	before = make(map[plan.ServicePortName]*record)
	for name, port := range desired.Services {
		if rec := r.record(port); rec != nil {
			before[name] = rec
		}
	}
	if intact, err := r.intact(old); err != nil || !intact {
		return nil, nil, before, err
	}
	if st, err = newStateOf(w.family, desired, before, r.chains); err != nil {
		return nil, nil, before, nil // whoever writes all anew will say so
	}
	return st, r.compare(st), before, nil
}

// intact says whether the table has these very rules, chains and sets.
func (r *resumption) intact(old *legacy) (bool, error) {
	if !old.keeps || len(old.sets) != len(schemas) || !slices.Contains(old.chains, r.rules.digest()) {
		return false, nil
	}
	for _, s := range schemas {
		if !slices.Contains(old.sets, s.name) {
			return false, nil
		}
	}
	chains := slices.Concat(r.rules.fixedChains(), r.rules.nodeChains(), r.rules.baseChains())
	for c, id := range r.chains {
		if c.ownNumber() && id != uint32(c.size) {
			return false, nil
		}
		chains = append(chains, c.chain(r.family))
	}
	if len(old.chains) != len(chains)+1 {
		return false, nil
	}
	// Somebody may have taken rules away, or put some in.
	for _, c := range chains {
		if whole, err := r.whole(c); err != nil || !whole {
			return false, err
		}
	}
	return true, nil
}

// whole says whether a chain is there with as many rules as it should have.
func (r *resumption) whole(c chain) (bool, error) {
	rules, err := r.conn.GetRules(r.table, &nflib.Chain{Name: c.name, Table: r.table})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list the rules of %s: %w", c.name, err)
	}
	return len(rules) == len(c.rules), nil
}

func (r *resumption) read() error {
	conn, err := dialForReading()
	if err != nil {
		return err
	}
	defer refill()
	defer conn.CloseLasting()
	r.held = make(contents)
	for i, s := range schemas {
		if s.dynamic {
			continue
		}
		elements, err := conn.GetSetElements(r.sets[i])
		if errors.Is(err, unix.ENOENT) {
			continue // of an older release
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", s.name, err)
		}
		for j := range elements {
			r.held[holdingOf(setID(i), &elements[j])] = elements[j]
		}
	}
	return nil
}

// readChains finds the sized chains and their numbers.
func (r *resumption) readChains() {
	r.chains, r.byID = make(map[sizedChain]uint32), make(map[uint32]sizedChain)
	for h, e := range r.held {
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
func (r *resumption) record(port *plan.ServicePort) *record {
	rec := &record{port: &plan.ServicePort{Name: port.Name, AffinityTimeout: port.AffinityTimeout}}
	for i, set := range distinctSets(port) {
		id, ok := r.idOf(port, set)
		if !ok {
			break
		}
		numbered, ok := r.numberedSet(port, i, id)
		if !ok {
			break
		}
		if rec.block = numbered.base; i > 0 && rec.sticky() && rec.block != rec.sets[0].base {
			break
		}
		rec.sets = append(rec.sets, numbered)
	}
	if len(rec.sets) == 0 {
		return nil
	}
	rec.block = 0
	if rec.sticky() {
		rec.block = rec.sets[0].base
	}
	return rec
}

// idOf is the id that the table has for a set of the Service port's: that of a
// frontend that leads to it.
func (r *resumption) idOf(port *plan.ServicePort, set *plan.EndpointSet) (uint32, bool) {
	for i := range port.Frontends {
		fe := &port.Frontends[i]
		sets, key := addressedSets, frontendBytes(fe.Key(port.Name.Protocol))
		if !fe.Addr.IsValid() {
			sets = nodePortSets
		}
		id, ok := uint32(0), false
		if fe.Internal == set {
			id, ok = r.held.datum(sets.internal, key)
		}
		if !ok && (fe.External == set || fe.Internal == set) {
			id, ok = r.held.datum(sets.external, key)
		}
		if ok && id >= plainFirst && id&idSpaceMask == idSpace && (id >= smallFirst) == (port.AffinityTimeout > 0) {
			return id, true
		}
	}
	return 0, false
}

// numberedSet reads the endpoints of the set with an id, by slot.
func (r *resumption) numberedSet(port *plan.ServicePort, i int, id uint32) (numberedSet, bool) {
	c, known := r.byID[id&chainMask]
	if !known || c.timeout > 0 != (port.AffinityTimeout > 0) {
		return numberedSet{}, false
	}
	if port.AffinityTimeout > 0 {
		return r.stickySet(i, id, c)
	}
	set := numberedSet{EndpointSet: &plan.EndpointSet{}, base: id &^ chainMask}
	for slot := range c.size {
		addr, ok := r.addr(endpoints, slotKey(set.base, slot))
		if !ok {
			return numberedSet{}, false
		}
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: addr})
	}
	return set, true
}

func (r *resumption) stickySet(i int, id uint32, c sizedChain) (numberedSet, bool) {
	large := id >= largeFirst
	set := numberedSet{EndpointSet: &plan.EndpointSet{}, base: id & blockMask(large)}
	if c.variant != i || c.large != large {
		return set, false
	}
	for slot := range c.size {
		number, ok := r.held.datum(affinitySlots, slotKey(set.base|uint32(i), slot))
		if !ok {
			return set, false
		}
		addr, ok := r.addr(affinityEndpoints+setID(i), idKey(number))
		if !ok {
			return set, false
		}
		set.Endpoints = append(set.Endpoints, plan.Endpoint{AddrPort: addr})
		set.numbers = append(set.numbers, number&(endpointFlag(large)-1))
	}
	return set, true
}

// addr reads an endpoint.
func (r *resumption) addr(set setID, key string) (netip.AddrPort, bool) {
	e, ok := r.held[holding{set: set, key: key}]
	if !ok || len(e.Val) != r.addrLen+4 {
		return netip.AddrPort{}, false
	}
	addr, _ := netip.AddrFromSlice(e.Val[:r.addrLen])
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(e.Val[r.addrLen:])), true
}

// repair is what makes a table that was found the one that is wanted.
type repair struct {
	chains      []sizedChain // to make
	remove, add map[setID][]nflib.SetElement
	elements    int // that the table holds then, but for clients with affinity
}

// compare finds what is missing and what is too much. It uses up what was read.
func (r *resumption) compare(st *state) *repair {
	p := &repair{remove: map[setID][]nflib.SetElement{}, add: map[setID][]nflib.SetElement{}}
	for c := range st.chains {
		if _, there := r.chains[c]; !there {
			p.chains = append(p.chains, c)
		}
	}
	slices.SortFunc(p.chains, sizedChain.compare)
	var wanted []nflib.SetElement
	emit := func(e element) {
		p.elements++
		wanted = r.schemas[e.set].wire(&e, wanted[:0])
		for i := range wanted {
			h := holdingOf(e.set, &wanted[i])
			if have, there := r.held[h]; there && same(&have, &wanted[i]) {
				delete(r.held, h)
				continue
			}
			p.add[e.set] = append(p.add[e.set], wanted[i])
		}
	}
	r.rules.compileNode(emit)
	st.emitAll(emit)
	for h, e := range r.held {
		p.remove[h.set] = append(p.remove[h.set], nflib.SetElement{Key: e.Key, KeyEnd: e.KeyEnd, IntervalEnd: e.IntervalEnd})
	}
	return p
}

// same compares what was read with what would be written.
func same(have, want *nflib.SetElement) bool {
	if want.VerdictData != nil {
		return verdictChain(have.Val) == want.VerdictData.Chain
	}
	return string(have.Val) == string(want.Val) && have.Comment == want.Comment && have.IntervalOpen == want.IntervalOpen
}

// writeRepair writes a repair in one transaction.
func writeRepair(w *wire, p *repair) error {
	chains := make([]chain, len(p.chains))
	for i, c := range p.chains {
		chains[i] = c.chain(w.family)
	}
	w.addChains(chains)
	for set := range setCount {
		inBatches(w, set, p.remove[set], w.conn.SetDeleteElements)
	}
	for set := range setCount {
		inBatches(w, set, p.add[set], w.conn.SetAddElements)
	}
	return w.flush()
}

func inBatches(w *wire, set setID, list []nflib.SetElement, op func(*nflib.Set, []nflib.SetElement) error) {
	for batch := range slices.Chunk(list, batchElements) {
		w.check(op(w.sets[set], batch), w.sets[set])
	}
}

// parseChainName reads what sizedChain.name writes.
func parseChainName(name string) (c sizedChain, ok bool) {
	rest, large := strings.CutSuffix(name, "-large")
	c.large = large
	if before, after, found := strings.Cut(rest, "-set-"); found {
		if _, err := fmt.Sscanf(after, "%d", &c.variant); err != nil {
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
