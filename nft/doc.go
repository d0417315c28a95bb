// Package nft is a library for nf_tables: the statements that rules are made of, chains,
// sets, elements, and a table with its transactions, spoken to over netlink. No nft
// binary is needed. It knows nothing of Services.
//
// A Statement holds the kernel's expressions and the text in which nft lists them, side
// by side. Names follow `man nft`: a Value is an expression such as `ip saddr`; a match
// is a Statement that compares a Value; the others act on the packet. RenderTable prints
// a table as `nft list table` does, and touches no kernel.
//
// Read chain.go, value.go, match.go and action.go for rules; set.go and element.go for
// sets; table.go for transactions; contents.go for what the kernel holds.
package nft
