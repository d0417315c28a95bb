package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	nflib "github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// This file names what other modes share that keep a table of their own in
// nf_tables: the parts that rules are made of, sets and their elements, and the
// transaction that writes them. What is particular to this mode's table stays
// unnamed.
type (
	// IPFamily holds what differs between the two IP families in rules.
	IPFamily = family
	// Value is something of a packet that can be loaded into registers.
	Value = value
	// Statement is one part of a rule, as expressions and as nft's text.
	Statement = statement
	// Rule is a list of statements; a packet that fails one leaves the rule.
	Rule = rule
	// Chain is one chain with its rules.
	Chain = chain
	// Hook binds a base chain.
	Hook = hook
	// Field is the type of one field of a key or datum.
	Field = fieldType
	// Set is the declaration of a set or map.
	Set = schema
	// Element is one element of a set or map.
	Element = element
	// Transaction is a connection to nf_tables for one table. What is put into
	// it is written by Commit, all or nothing.
	Transaction = wire
)

// The fields that keys and data are made of.
const (
	AddrField  = addrField
	ProtoField = protoField
	PortField  = portField
)

// The hooks that Services are handled at. See hook for their priorities.
var (
	PreDNATPrerouting = preDNATPrerouting
	PreDNATOutput     = preDNATOutput
	FilterInput       = filterInput
	FilterForward     = filterForward
	FilterOutput      = filterOutput
)

// NewHook makes a hook at which filter chains are run; text is what nft lists
// for it.
func NewHook(num *nflib.ChainHook, priority nflib.ChainPriority, text string) *Hook {
	return &hook{nflib.ChainTypeFilter, num, priority, text}
}

// NewNATHook makes a hook at which destinations are rewritten.
func NewNATHook(num *nflib.ChainHook, priority nflib.ChainPriority, text string) *Hook {
	return &hook{nflib.ChainTypeNAT, num, priority, text}
}

// NewChain makes a chain; hook is nil for one that is only jumped to.
func NewChain(name string, hook *Hook, rules ...Rule) Chain {
	return chain{name: name, hook: hook, rules: rules}
}

// NewRule makes a rule.
func NewRule(statements ...Statement) Rule { return newRule(statements...) }

// Because gives the rule a comment.
func (r rule) Because(comment string) Rule { return r.because(comment) }

// FamilyOf returns the differences of a family.
func FamilyOf(f plan.Family) *IPFamily { return familyOf(f) }

// Word is nft's name of the family: ip or ip6.
func (f *family) Word() string { return f.word }

// Holds says whether an address is one of this family.
func (f *family) Holds(a netip.Addr) bool { return f.holds(a) }

// Daddr is a packet's destination address.
func (f *family) Daddr() Value { return f.daddr() }

// Saddr is a packet's source address.
func (f *family) Saddr() Value { return f.saddr() }

// Reject answers with ICMP port unreachable.
func (f *family) Reject() Statement { return f.reject() }

// NotLoopback matches packets to other than loopback addresses.
func (f *family) NotLoopback() Statement { return f.notLoopback() }

// DaddrIs matches packets to the address.
func (f *family) DaddrIs(a netip.Addr) Statement {
	return statement{f.word + " daddr " + a.String(), append(f.daddr().load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: a.AsSlice()})}
}

// DNATToPort sends the connection to the address that v gives, and to a port.
func (f *family) DNATToPort(v Value, port uint16) Statement {
	to := reg32(v.regs)
	if n := uint32(f.addrLen / 4); n > v.regs {
		to = reg32(n)
	}
	return statement{fmt.Sprintf("dnat %s to %s:%d", f.word, v.text, port), append(v.load(0),
		&expr.Immediate{Register: to, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.table), RegAddrMin: reg32(0), RegProtoMin: to},
	)}
}

// The fields of a packet's transport header and what tells its protocol.
var (
	L4Proto = l4proto
	DPort   = dport
)

// Join concatenates values.
func Join(values ...Value) Value { return join(values...) }

// In matches a packet whose value is an element of the set.
func In(v Value, set string) Statement {
	return statement{v.text + " @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set})}
}

// NotIn matches a packet whose value is no element of the set.
func NotIn(v Value, set string) Statement {
	return statement{v.text + " != @" + set, append(v.load(0), &expr.Lookup{SourceRegister: reg32(0), SetName: set, Invert: true})}
}

// LookedUp is the datum that the map holds for v. A packet for which it holds
// none leaves the rule.
func LookedUp(v Value, m string) Value {
	return value{text: v.text + " map @" + m, regs: 1, load: func(reg uint32) []expr.Any {
		return append(v.load(reg), &expr.Lookup{
			SourceRegister: reg32(reg), DestRegister: reg32(reg), IsDestRegSet: true, SetName: m,
		})
	}}
}

// Drop discards the packet.
func Drop() Statement { return drop() }

// Return leaves the chain.
func Return() Statement { return returns() }

// Jump goes to another chain, and comes back from it.
func Jump(chain string) Statement { return jump(chain) }

// GoTo goes to another chain for good.
func GoTo(chain string) Statement { return goTo(chain) }

// StateNew matches packets that open a connection.
func StateNew() Statement { return stateNew() }

// IsDNATed matches connections whose destination was rewritten, by whomever.
func IsDNATed() Statement { return isDNATed() }

// FibLocal matches packets whose source or destination is an address of this
// node.
func FibLocal(source bool) Statement { return fibLocal(source) }

// FibNotLocal matches packets to other than this node's addresses.
func FibNotLocal() Statement { return fibNotLocal() }

// EntersBy matches packets that came in by the interface, or by any whose name
// begins so.
func EntersBy(name string, isPrefix bool) Statement { return entersBy(name, isPrefix) }

// SetMarkBit sets or clears a bit of the packet mark.
func SetMarkBit(bit uint32, on bool) Statement { return setMarkBit(bit, on) }

// PriorityIs matches packets of exactly this priority.
func PriorityIs(id uint32) Statement {
	return statement{"meta priority " + idText(id), append(priority.load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: host32(id)})}
}

// ClearPriority sets the priority to 0.
func ClearPriority() Statement { return clearPriority() }

// TransparentSocket matches packets for an open socket of this node that is
// bound to an address which is not the node's.
func TransparentSocket() Statement {
	return statement{"socket transparent 1", []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: []byte{1}},
	}}
}

// ProtocolIs matches packets of a transport protocol.
func ProtocolIs(p plan.Protocol) Statement {
	return statement{"meta l4proto " + p.String(), append(l4proto.load(0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg32(0), Data: []byte{byte(p)}})}
}

// DPortsBetween matches packets to the ports from first to last.
func DPortsBetween(first, last uint16) Statement {
	return statement{fmt.Sprintf("th dport %d-%d", first, last), append(dport.load(0),
		&expr.Range{Op: expr.CmpOpEq, Register: reg32(0),
			FromData: binary.BigEndian.AppendUint16(nil, first), ToData: binary.BigEndian.AppendUint16(nil, last)})}
}

// NewSet declares a set, or with data a map.
func NewSet(name string, key, data []Field, comment string) *Set {
	return &schema{name: name, key: key, data: data, comment: comment}
}

// OfRanges makes the set one of ranges.
func (s *schema) OfRanges() *Set {
	s.interval = true
	return s
}

// NewElement makes an element of the set with this number: its place in the
// list that OpenTable got. End is the end of a range, or empty.
func NewElement(set int, key, end, data, comment string) Element {
	return element{set: setID(set), key: key, end: end, data: data, comment: comment}
}

// Set is the number of the element's set.
func (e *element) Set() int { return int(e.set) }

// Bytes are the element's key and data as the kernel keeps them.
func (e *element) Bytes() (key, data string) { return e.key, e.data }

// FrontendBytes is the key of a map by address . protocol . port, or, for a
// node port, by protocol . port.
func FrontendBytes(k plan.FrontendKey) string { return frontendBytes(k) }

// CommentText makes a name fit to be a comment.
func CommentText(name string) string { return commentText(name) }

// Disjoint drops the prefixes that lie in others of the list.
func Disjoint(prefixes []netip.Prefix) []netip.Prefix { return disjoint(prefixes) }

// LastAddr is the highest address of a prefix.
func LastAddr(p netip.Prefix) netip.Addr { return lastAddr(p) }

// OpenTable connects to nf_tables for a table with these sets.
func OpenTable(f *IPFamily, table string, sets []*Set) (*Transaction, error) {
	for i, s := range sets {
		s.id = setID(i)
	}
	return dialTable(f, table, sets)
}

// ReplaceTable deletes the table if it exists and makes it anew, with its sets.
func (w *wire) ReplaceTable() {
	w.replaceTable()
	w.addSets()
}

// DeleteTable deletes the table if it exists, which it says. If not, there is
// nothing to Commit.
func (w *wire) DeleteTable() (exists bool) {
	exists, err := w.exists()
	switch {
	case err != nil && w.failed == nil:
		w.failed = err
	case exists:
		w.deleteTable()
	}
	return exists
}

// AddChains adds chains and then their rules, which may jump to any of them.
func (w *wire) AddChains(chains []Chain) { w.addChains(chains) }

// RewriteChains replaces the rules of chains that exist.
func (w *wire) RewriteChains(chains []Chain) { w.rewriteChains(chains) }

// FlushSet empties a set.
func (w *wire) FlushSet(set int) { w.flushSet(setID(set)) }

// AddElements adds elements, sorted by set.
func (w *wire) AddElements(list []Element) { w.add(list) }

// RemoveElements removes elements, sorted by set.
func (w *wire) RemoveElements(list []Element) { w.remove(list) }

// Commit writes what has gathered as one transaction. See flush for its errors.
func (w *wire) Commit() error { return w.flush() }

// Close closes the connection. The table stays.
func (w *wire) Close() error { return w.close() }

// Read lists a set's elements in the kernel; none if there is no such set.
func (w *wire) Read(set int) ([]nflib.SetElement, error) {
	elements, err := w.conn.GetSetElements(w.sets[set])
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return elements, err
}

// RenderTable prints a table as `nft list table` does.
func RenderTable(f *IPFamily, name string, sets []*Set, elements []Element, chains []Chain) string {
	texts := make([][]string, len(sets))
	for i := range elements {
		e := &elements[i]
		texts[e.set] = append(texts[e.set], sets[e.set].elementText(e, f))
	}
	return renderTable(f, name, nil, sets, texts, chains)
}

// DropTable deletes a table that the same transaction has made.
func (w *wire) DropTable() { w.conn.DelTable(w.table) }
