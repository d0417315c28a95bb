// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// batch is one transaction of nf_tables in the form that the kernel reads. The library for
// nf_tables would ask for an echo of each rule. With 100,000 rules the echo fills tens of
// megabytes of socket buffer.
type batch struct {
	family uint8
	data   []byte
	last   int // where the last message begins
}

func newBatch(family uint8, size int) *batch {
	b := &batch{family: family, data: make([]byte, 0, size)}
	b.edge(unix.NFNL_MSG_BATCH_BEGIN)
	return b
}

// edge is the first or last message.
func (b *batch) edge(kind uint16) {
	b.header(kind, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
}

// request is a message about an object of nf_tables.
func (b *batch) request(kind, flags uint16, attributes func()) {
	b.last = len(b.data)
	b.header(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, b.family, 0, attributes)
}

// header writes struct nlmsghdr, struct nfgenmsg and what follows.
func (b *batch) header(kind, flags uint16, family uint8, resource uint16, attributes func()) {
	start := len(b.data)
	b.data = append(b.data, 0, 0, 0, 0)
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = binary.NativeEndian.AppendUint16(b.data, unix.NLM_F_REQUEST|flags)
	b.data = append(b.data, 0, 0, 0, 0, 0, 0, 0, 0) // sequence and port
	b.data = append(b.data, family, unix.NFNETLINK_V0)
	b.data = binary.BigEndian.AppendUint16(b.data, resource)
	if attributes != nil {
		attributes()
	}
	binary.NativeEndian.PutUint32(b.data[start:], uint32(len(b.data)-start))
}

// nested writes an attribute that holds others.
func (b *batch) nested(kind uint16, attributes func()) {
	start := len(b.data)
	b.data = append(b.data, 0, 0)
	b.data = binary.NativeEndian.AppendUint16(b.data, unix.NLA_F_NESTED|kind)
	attributes()
	binary.NativeEndian.PutUint16(b.data[start:], uint16(len(b.data)-start))
}

func (b *batch) bytes(kind uint16, data []byte) {
	b.data = binary.NativeEndian.AppendUint16(b.data, uint16(unix.SizeofNlAttr+len(data)))
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = append(b.data, data...)
	b.pad()
}

func (b *batch) pad() {
	for len(b.data)%unix.NLA_ALIGNTO != 0 {
		b.data = append(b.data, 0)
	}
}

// text writes a string with its terminating zero.
func (b *batch) text(kind uint16, s string) {
	b.data = binary.NativeEndian.AppendUint16(b.data, uint16(unix.SizeofNlAttr+len(s)+1))
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = append(append(b.data, s...), 0)
	b.pad()
}

func (b *batch) number(kind uint16, n uint32) {
	b.data = binary.NativeEndian.AppendUint16(b.data, unix.SizeofNlAttr+4)
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = binary.BigEndian.AppendUint32(b.data, n)
}

func (b *batch) addChain(table, name string) {
	b.request(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, func() {
		b.text(unix.NFTA_CHAIN_TABLE, table)
		b.text(unix.NFTA_CHAIN_NAME, name)
	})
}

func (b *batch) deleteChain(table, name string) {
	b.request(unix.NFT_MSG_DELCHAIN, 0, func() {
		b.text(unix.NFTA_CHAIN_TABLE, table)
		b.text(unix.NFTA_CHAIN_NAME, name)
	})
}

func (b *batch) flushChain(table, name string) {
	b.request(unix.NFT_MSG_DELRULE, 0, func() {
		b.text(unix.NFTA_RULE_TABLE, table)
		b.text(unix.NFTA_RULE_CHAIN, name)
	})
}

// addRule adds a rule of these expressions. A protocol other than 0 is the one that a
// match of xtables requires.
func (b *batch) addRule(table, chain string, expressions func() (protocol uint8)) {
	b.request(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, func() {
		b.text(unix.NFTA_RULE_TABLE, table)
		b.text(unix.NFTA_RULE_CHAIN, chain)
		var protocol uint8
		b.nested(unix.NFTA_RULE_EXPRESSIONS, func() { protocol = expressions() })
		if protocol != 0 {
			b.nested(unix.NFTA_RULE_COMPAT, func() {
				b.number(unix.NFTA_RULE_COMPAT_PROTO, uint32(protocol))
				b.number(unix.NFTA_RULE_COMPAT_FLAGS, 0)
			})
		}
	})
}

// refusedError says that the kernel has what it had before.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

// commit sends the transaction. The kernel answers before sendto returns.
func (b *batch) commit() error {
	if b.last == 0 {
		return nil
	}
	flags := b.data[b.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	b.edge(unix.NFNL_MSG_BATCH_END)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return refusedError{fmt.Errorf("socket: %w", err)}
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, len(b.data)) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, len(b.data))
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.Sendto(fd, b.data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return refusedError{fmt.Errorf("sendto: %w", err)}
	}
	return outcome(fd)
}

// outcome reads the kernel's first answer: 0, or the error number of a request.
func outcome(fd int) error {
	answer := make([]byte, 8<<10)
	n, _, err := unix.Recvfrom(fd, answer, unix.MSG_DONTWAIT)
	if err != nil {
		return fmt.Errorf("recvfrom: %w", err)
	}
	const size = unix.SizeofNlMsghdr + 4
	if n < size || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("an answer of %d bytes that is no outcome", n)
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
		return refusedError{syscall.Errno(-code)}
	}
	return nil
}

// The expressions of a rule. Values go through one register, as in iptables-nft.

const register = unix.NFT_REG_1

func (b *batch) expression(name string, attributes func()) {
	b.nested(unix.NFTA_LIST_ELEM, func() {
		b.text(unix.NFTA_EXPR_NAME, name)
		b.nested(unix.NFTA_EXPR_DATA, attributes)
	})
}

func (b *batch) value(kind uint16, data []byte) {
	b.nested(kind, func() { b.bytes(unix.NFTA_DATA_VALUE, data) })
}

func (b *batch) loadMeta(key uint32) {
	b.expression("meta", func() {
		b.number(unix.NFTA_META_KEY, key)
		b.number(unix.NFTA_META_DREG, register)
	})
}

func (b *batch) loadHeader(offset uint32, length int) {
	b.expression("payload", func() {
		b.number(unix.NFTA_PAYLOAD_DREG, register)
		b.number(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_NETWORK_HEADER)
		b.number(unix.NFTA_PAYLOAD_OFFSET, offset)
		b.number(unix.NFTA_PAYLOAD_LEN, uint32(length))
	})
}

func (b *batch) and(mask []byte) {
	b.expression("bitwise", func() {
		b.number(unix.NFTA_BITWISE_SREG, register)
		b.number(unix.NFTA_BITWISE_DREG, register)
		b.number(unix.NFTA_BITWISE_LEN, uint32(len(mask)))
		b.value(unix.NFTA_BITWISE_MASK, mask)
		b.value(unix.NFTA_BITWISE_XOR, make([]byte, len(mask)))
	})
}

func (b *batch) compare(data []byte, not bool) {
	op := uint32(unix.NFT_CMP_EQ)
	if not {
		op = unix.NFT_CMP_NEQ
	}
	b.expression("cmp", func() {
		b.number(unix.NFTA_CMP_SREG, register)
		b.number(unix.NFTA_CMP_OP, op)
		b.value(unix.NFTA_CMP_DATA, data)
	})
}

// Verdicts of the kernel beside NFT_RETURN, NFT_JUMP and NFT_GOTO.
const (
	drop   = 0
	accept = 1
)

func (b *batch) counter() { b.expression("counter", func() {}) }

// verdict leads to a chain if it is NFT_JUMP or NFT_GOTO.
func (b *batch) verdict(code int32, chain string) {
	b.expression("immediate", func() {
		b.number(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		b.nested(unix.NFTA_IMMEDIATE_DATA, func() {
			b.nested(unix.NFTA_DATA_VERDICT, func() {
				b.number(unix.NFTA_VERDICT_CODE, uint32(code))
				if chain != "" {
					b.text(unix.NFTA_VERDICT_CHAIN, chain)
				}
			})
		})
	})
}

// extension is a match or a target of xtables.
func (b *batch) extension(kind, name string, revision uint32, info []byte) {
	b.expression(kind, func() {
		b.text(unix.NFTA_MATCH_NAME, name) // targets have the same numbers
		b.number(unix.NFTA_MATCH_REV, revision)
		b.bytes(unix.NFTA_MATCH_INFO, info)
	})
}
