// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Contents is what the kernel has in a table.
type Contents struct {
	// Dormant: other software has switched the table off.
	Dormant  bool
	Chains   []*nftables.Chain
	Sets     []*nftables.Set
	Counters []string
}

// Inspect lists what the kernel has in the table, except rules and elements. It returns
// nil if there is no table.
func (t *Table) Inspect() (*Contents, error) {
	found, err := t.find()
	if err != nil || found == nil {
		return nil, err
	}
	c := Contents{Dormant: found.Flags&nftables.TableFlagDormant != 0}
	chains, err := t.conn.ListChainsOfTableFamily(t.IPFamily.Table)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	for _, chain := range chains {
		if chain.Table.Name == t.table.Name {
			c.Chains = append(c.Chains, chain)
		}
	}
	if c.Sets, err = t.conn.GetSets(t.table); err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	objects, err := t.conn.GetNamedObjects(t.table)
	if err != nil {
		return nil, fmt.Errorf("list counters: %w", err)
	}
	for _, o := range objects {
		if n, ok := o.(*nftables.NamedObj); ok && n.Type == nftables.ObjTypeCounter {
			c.Counters = append(c.Counters, n.Name)
		}
	}
	return &c, nil
}

// HasSet says whether the kernel has the set in the form in which Open declared it.
func (t *Table) HasSet(c *Contents, id SetID) bool {
	return c != nil && slices.ContainsFunc(c.Sets, func(s *nftables.Set) bool {
		return s.Name == t.declared[id].Name && sameForm(s, t.declared[id])
	})
}

// sameForm says whether a set in the kernel can have the elements of the declared one.
func sameForm(have, want *nftables.Set) bool {
	return have.IsMap == want.IsMap && have.Interval == want.Interval && have.Dynamic == want.Dynamic &&
		have.HasTimeout == want.HasTimeout && have.Size == want.Size &&
		have.KeyType.Name == want.KeyType.Name && have.KeyType.Bytes == want.KeyType.Bytes && have.DataType.Name == want.DataType.Name &&
		// The kernel answers with a size of its own for verdicts.
		(have.DataType.Bytes == want.DataType.Bytes || want.DataType.Name == nftables.TypeVerdict.Name)
}

// ReplaceContents replaces all chains and sets of an existing table, except one map that
// packets fill. The map keeps its elements. A table that other software has switched off
// (dormant) works again.
func (t *Table) ReplaceContents(c *Contents, kept SetID) {
	t.conn.AddTable(t.table)
	t.conn.FlushTable(t.table)
	for _, s := range c.Sets {
		if s.Name != t.declared[kept].Name {
			t.conn.DelSet(&nftables.Set{Table: t.table, Name: s.Name})
		}
	}
	for _, chain := range c.Chains {
		t.conn.DelChain(&nftables.Chain{Table: t.table, Name: chain.Name})
	}
	t.AddSets(kept)
}

// Read lists a set's elements in the kernel. It lists none if there is no such set.
func (t *Table) Read(id SetID) ([]nftables.SetElement, error) { return t.read(t.conn, id) }

// ReadAll hands out the elements of each set that packets do not fill, set by set. It
// leaves out the sets of except.
func (t *Table) ReadAll(emit func(SetID, []nftables.SetElement), except ...SetID) error {
	conn, err := dialForReading(t.options)
	if err != nil {
		return err
	}
	defer refill()
	defer conn.CloseLasting()
	for i, s := range t.sets {
		if s.Dynamic || slices.Contains(except, SetID(i)) {
			continue
		}
		elements, err := t.read(conn, SetID(i))
		if err != nil {
			return err
		}
		emit(SetID(i), elements)
	}
	return nil
}

// CompareChains says how the table differs from these chains with their rules and from the
// sets of Open.
func (t *Table) CompareChains(c *Contents, chains []Chain) (found []string, err error) {
	if c == nil {
		return []string{"the table is missing"}, nil
	}
	if c.Dormant {
		found = append(found, "the table is dormant")
	}
	sets, haveChains := make(map[string]*nftables.Set), make(map[string]*nftables.Chain)
	for _, s := range c.Sets {
		sets[s.Name] = s
	}
	for _, chain := range c.Chains {
		haveChains[chain.Name] = chain
	}
	for _, want := range t.declared {
		if have := sets[want.Name]; have == nil {
			found = append(found, fmt.Sprintf("set %s is missing", want.Name))
		} else if !sameForm(have, want) {
			found = append(found, fmt.Sprintf("set %s has another type", want.Name))
		}
		delete(sets, want.Name)
	}
	for _, chain := range chains {
		differences, err := t.compareChain(haveChains[chain.Name], chain)
		if err != nil {
			return nil, err
		}
		found = append(found, differences...)
		delete(haveChains, chain.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(haveChains)) {
		found = append(found, fmt.Sprintf("chain %s is not signalbox's", name))
	}
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		found = append(found, fmt.Sprintf("set %s is not signalbox's", name))
	}
	return found, nil
}

// compareChain says how a chain differs. have is nil if the kernel lacks it.
func (t *Table) compareChain(have *nftables.Chain, chain Chain) (found []string, err error) {
	if have == nil {
		return []string{fmt.Sprintf("chain %s is missing", chain.Name)}, nil
	}
	if want := t.chain(chain); have.Type != want.Type || !reflect.DeepEqual(have.Hooknum, want.Hooknum) ||
		!reflect.DeepEqual(have.Priority, want.Priority) || !reflect.DeepEqual(have.Policy, want.Policy) {
		found = append(found, fmt.Sprintf("chain %s has another type, hook, priority or policy", chain.Name))
	}
	rules, err := t.conn.GetRules(t.table, have)
	if err != nil {
		return nil, fmt.Errorf("list the rules of %s: %w", chain.Name, err)
	}
	if len(rules) != len(chain.Rules) {
		return append(found, fmt.Sprintf("chain %s has %d rules instead of %d", chain.Name, len(rules), len(chain.Rules))), nil
	}
	for i, r := range chain.Rules {
		data, err := r.userData(t.table.Family)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(rules[i].UserData, data) {
			found = append(found, fmt.Sprintf("chain %s has another rule, with handle %d, in the place of: %s", chain.Name, rules[i].Handle, r.text()))
		}
	}
	return found, nil
}

// elementPlace is where a table has an element.
type elementPlace struct {
	set      SetID
	key, end string
	closes   bool // the end of an interval over one field
}

func placeOf(set SetID, e *nftables.SetElement) elementPlace {
	return elementPlace{set, string(e.Key), string(e.KeyEnd), e.IntervalEnd}
}

// KernelElements are the elements that the kernel has in a table, except those that
// packets make.
type KernelElements map[elementPlace]nftables.SetElement

// ReadElements reads all elements, but those of the sets of except.
func (t *Table) ReadElements(except ...SetID) (KernelElements, error) {
	k := make(KernelElements)
	err := t.ReadAll(func(set SetID, elements []nftables.SetElement) {
		for i := range elements {
			k[placeOf(set, &elements[i])] = elements[i]
		}
	}, except...)
	return k, err
}

// Find returns the element with a key.
func (k KernelElements) Find(set SetID, key string) (nftables.SetElement, bool) {
	e, ok := k[elementPlace{set: set, key: key}]
	return e, ok
}

// Verdicts are the chains of a verdict map, by key.
func (k KernelElements) Verdicts(set SetID) map[string]string {
	chains := make(map[string]string)
	for place, e := range k {
		if place.set == set {
			chains[place.key] = verdictChain(e.Val)
		}
	}
	return chains
}

// Difference is what a table lacks, and what it has too much.
type Difference struct {
	sets        []*Set
	remove, add map[SetID][]nftables.SetElement
}

// Compare finds the difference from the elements that wanted hands out, each once. It
// uses up k.
func (t *Table) Compare(k KernelElements, wanted func(emit func(Element))) *Difference {
	d := &Difference{t.sets, map[SetID][]nftables.SetElement{}, map[SetID][]nftables.SetElement{}}
	var list []nftables.SetElement
	wanted(func(e Element) {
		list = t.sets[e.Set].LibraryElements(&e, list[:0])
		for i := range list {
			place := placeOf(e.Set, &list[i])
			if have, present := k[place]; present && same(&have, &list[i]) {
				delete(k, place)
				continue
			}
			d.add[e.Set] = append(d.add[e.Set], list[i])
		}
	})
	for place, e := range k {
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

// Texts say for each set what differs; none if nothing does.
func (d *Difference) Texts() (texts []string) {
	for id, s := range d.sets {
		if n := len(d.add[SetID(id)]); n > 0 {
			texts = append(texts, fmt.Sprintf("set %s lacks %d elements", s.Name, n))
		}
		if n := len(d.remove[SetID(id)]); n > 0 {
			texts = append(texts, fmt.Sprintf("set %s has %d elements that signalbox did not write", s.Name, n))
		}
	}
	return texts
}

// Correct gathers what makes the elements those that were wanted.
func (t *Table) Correct(d *Difference) {
	for id := range t.sets {
		t.RemoveRead(SetID(id), d.remove[SetID(id)])
	}
	for id := range t.sets {
		t.AddRead(SetID(id), d.add[SetID(id)])
	}
}

func (t *Table) read(conn *nftables.Conn, id SetID) ([]nftables.SetElement, error) {
	elements, err := conn.GetSetElements(t.declared[id])
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", t.sets[id].Name, err)
	}
	return elements, nil
}

// readKeys reads the elements with these keys, one by one: the kernel's answer to several
// ends at the first that it does not have.
func (t *Table) readKeys(id SetID, keys map[string]bool) (found []nftables.SetElement, err error) {
	for key := range keys {
		elements, err := t.conn.FindSetElements(t.declared[id], []nftables.SetElement{{Key: []byte(key)}})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("read %s: %w", t.sets[id].Name, err)
		}
		found = append(found, elements...)
	}
	return found, nil
}

// CounterPackets is how many packets a named counter has counted.
func (t *Table) CounterPackets(name string) (uint64, error) {
	obj, err := t.conn.GetObject(t.counter(name))
	if err != nil {
		return 0, fmt.Errorf("read counter %s: %w", name, err)
	}
	if named, ok := obj.(*nftables.NamedObj); ok {
		if c, ok := named.Obj.(*expr.Counter); ok {
			return c.Packets, nil
		}
	}
	return 0, fmt.Errorf("read counter %s: the kernel answered with another object", name)
}

// dialForReading opens a connection for long listings. The kernel walks a map from its
// beginning for each page of a listing. A page is as large as the largest buffer that
// the socket ever offered, up to 32 KiB. The library offers 4 KiB: a listing of 100,000
// elements takes six times as long with such pages.
func dialForReading(options []nftables.ConnOption) (*nftables.Conn, error) {
	conn, err := dial(append(slices.Clip(options), nftables.WithSockOptions(largePages))...)
	if err != nil {
		return nil, fmt.Errorf("open netlink to nf_tables for reading: %w", err)
	}
	return conn, nil
}

// largePages offers a large buffer for one answer of the kernel.
func largePages(c *netlink.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil // a connection to an nfttest.Kernel is no socket
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = askGeneration(int(fd)) }), err)
}

// askGeneration asks for the number of transactions. The kernel answers before the
// system call of the question returns.
func askGeneration(fd int) error {
	const size = unix.SizeofNlMsghdr + 4 // and struct nfgenmsg
	b := binary.NativeEndian.AppendUint32(nil, size)
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, size-len(b))...)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sendto: %w", err)
	}
	if _, _, err := unix.Recvfrom(fd, make([]byte, 64<<10), unix.MSG_DONTWAIT); err != nil {
		return fmt.Errorf("recvfrom: %w", err)
	}
	return nil
}
