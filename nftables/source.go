package nftables

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

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
func (f *family) SourceChains(n plan.Node) []Chain {
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
func (w *wire) RewriteNodeChains(chains []Chain, before, now plan.Node) {
	if len(now.RouteSources) > 0 {
		w.addChain(chain{name: sourceChain}) // one that is there stays
	}
	w.rewriteChains(chains)
	if len(before.RouteSources) > 0 && len(now.RouteSources) == 0 {
		w.deleteChain(sourceChain)
	}
}

// daddrIn compares the destination address with a prefix; operator is nft's word for op.
func (f *family) daddrIn(p netip.Prefix, operator string, op expr.CmpOp) statement {
	exprs, text := f.daddr().load(0), p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	} else {
		exprs = append(exprs, &expr.Bitwise{
			SourceRegister: reg32(0), DestRegister: reg32(0), Len: uint32(f.addrLen),
			Mask: net.CIDRMask(p.Bits(), f.HostBits()), Xor: make([]byte, f.addrLen),
		})
	}
	return statement{f.word + " daddr " + operator + text, append(exprs, &expr.Cmp{Op: op, Register: reg32(0), Data: p.Addr().AsSlice()})}
}

// oifname compares the interface that a packet leaves by.
func oifname(name, operator string, op expr.CmpOp) statement {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return statement{fmt.Sprintf("oifname %s%q", operator, name), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg32(0)},
		&expr.Cmp{Op: op, Register: reg32(0), Data: data},
	}}
}

// snatRandom rewrites the source to an address, and the port to any.
func (f *family) snatRandom(a netip.Addr) statement {
	return statement{fmt.Sprintf("snat to %s fully-random", a), []expr.Any{
		&expr.Immediate{Register: reg32(0), Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.table), RegAddrMin: reg32(0), FullyRandom: true},
	}}
}
