// SPDX-License-Identifier: Apache-2.0

// Package nft is a library for nf_tables over netlink, for programs that own a table and
// change it often. No nft binary is needed. It knows nothing of Services.
//
// A Statement holds the kernel's expressions and the text in which nft lists them, side
// by side. Names follow `man nft`: a Value is an expression such as `ip saddr`; a match
// is a Statement that compares a Value; the others act on the packet. RenderTable prints
// a table as `nft list table` does, and touches no kernel.
//
// A Table gathers changes, and Commit sends them as one transaction. If Commit fails, the
// kernel holds what it held before, unless the error wraps ErrUnknownState. An error that
// wraps ErrTableChanged says that other software changed the table. After either error,
// write the table anew. A Table is for one goroutine at a time.
//
// Keys and data are bytes in the kernel's form, of which the Append functions make one field
// after the other. Addresses, ports and the value of MarkDatum are
// big-endian. All other marks and ids have the machine's byte order. Rules take timeouts in whole seconds.
//
// Package nfttest plays nf_tables for tests. Read chain.go, value.go, match.go and action.go
// for rules; set.go and element.go for sets; table.go for transactions; contents.go for what
// the kernel holds.
package nft
