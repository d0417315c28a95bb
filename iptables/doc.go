// Package iptables is the mode that programs Services as iptables rules, with
// the legacy or the nft variant of the tools, whichever the node uses.
//
// A ServicePort compiles to chains of its own (compile.go) and to rules in
// dispatch trees (dispatch.go), which lead a new connection to those chains in
// a number of steps that grows with the logarithm of the number of Services.
// Both are values. A sync compares those of what was last applied with those
// of what is wanted and hands the difference to one iptables-restore
// (diff.go, restore.go).
//
// The chains that hang on the kernel's hooks, and the rules that jump to them,
// are kube-proxy's, name by name and comment by comment. All other chains have
// a prefix under which kube-proxy looks for chains to remove. So this mode
// takes a node over from kube-proxy by replacing the contents of its chains,
// and kube-proxy takes it back in the same way.
//
// Session affinity is kept in lists of the match recent, one for each endpoint.
// The kernel keeps at most ip_list_tot clients on each, 100 unless the module
// xt_recent was loaded with another number: beyond it the clients that were
// quiet for the longest time are forgotten first. A new connection to a Service
// with affinity asks every endpoint's list, one after the other.
package iptables
