// SPDX-License-Identifier: Apache-2.0

// Package iptables is the mode that programs Services as iptables rules, with
// the legacy or the nft variant of the tools, whichever the node uses.
//
// A changed ServicePort is compiled once. Read the files in this order, which
// is also the way of the data:
//
//   - proxier.go: the mode and its Proxier; Sync compiles, compares, applies and
//     commits
//   - compile.go: a ServicePort becomes chains of its own and entries of trees
//   - restrict.go: traffic sources, source ranges, reject and drop
//   - static.go: what depends on no Service: jumps, masquerade, root rules
//   - change.go: the difference to the state becomes a script of chains
//   - state.go: what the kernel holds, and how a new process recognises it
//   - tree.go, treechains.go: the dispatch trees lead a new connection to the
//     chains of its Service in a number of steps that grows with the logarithm
//     of the number of Services: the shape of a tree, and its chains
//   - names.go: tables and chain names
//   - kernel.go: what the kernel can do, and the settings that it needs
//   - cleanup.go: the removal of what this mode and kube-proxy wrote
//
// Package internal/xtables writes the script: with iptables-restore or, in the nft variant,
// through netlink.
//
// The chains that hang on the kernel's hooks, and the rules that jump to them,
// are kube-proxy's, name by name and comment by comment. All other chains have
// a prefix under which kube-proxy looks for chains to remove. So this mode
// takes a node over from kube-proxy by replacing the contents of its chains,
// and kube-proxy takes it back in the same way.
//
// Session affinity is kept in lists of the match recent, one for each endpoint.
// The kernel keeps at most ip_list_tot clients on each, 100 unless the module
// xt_recent was loaded with another number. Beyond it the kernel forgets the
// clients that were quiet for the longest time. A new connection to a Service
// with affinity checks every endpoint's list, one after the other.
package iptables
