// Package nftables serves Services with the kernel's nf_tables, spoken to over
// netlink; no nft binary is needed.
//
// The number of rules, chains and sets follows from how many different
// endpoint counts and affinity timeouts there are, never from the number of
// Services: nf_tables pays for every rule bound to a map each time an element
// is added, and for every element each time a rule is bound. All that grows
// with Services is elements of a few maps in one table:
//
//	frontends  address . protocol . port  ->  id of an endpoint set
//	endpoints  id . slot                  ->  address . port
//
// A packet that opens a connection finds its frontend and carries the id in its
// priority field (skb->priority) to the chain pick-N that fits a set of N
// endpoints; N is a part of the id. There a slot is drawn at random, and the
// packet is sent to the endpoint in that slot. The priority field is the
// scratch because nobody else's decisions hang on it between the hooks: the
// kernel itself sets it anew for forwarded IPv4 packets, while the packet mark
// and the conntrack mark belong to other software. It is set back to 0 after
// the decision; so the first packet of a local process's connection to a
// Service leaves with priority 0, whatever its socket asked for.
//
// Where traffic of this node's Pods and processes goes elsewhere than traffic
// from outside, a second map (internal-frontends) is looked at first, for
// packets of that origin only. NodePorts have maps of their own without the
// address.
//
// # Session affinity
//
// One map, affinity, remembers client . Service port -> endpoint, with a
// time-out that every new connection starts again. It holds endpoint ids, not
// addresses: an id is the Service port's number in the upper bits and the
// endpoint's in the lower ones, so that "is that endpoint still one of this
// set" is one more map lookup, and removing an endpoint is removing an
// element. A client whose endpoint is gone is given another and keeps it;
// nobody else notices. See stickyRules for the order of events. One limit
// follows: a Service port that outgrows 1024 endpoints gets a new number, and
// its clients choose anew once.
//
// What clients are remembered outlives the process: when the table is written
// anew, by whichever process, the affinity map stays, and Service ports and
// endpoints get the numbers back that they had.
//
// # Layers
//
// compile turns a Service port into elements, ruleset turns the node's facts
// into rules; both are pure. A stage holds the difference between what was
// last written and what is wanted. wire puts a stage into one netlink
// transaction, and is the only part that speaks to the kernel. Render prints
// compile's and ruleset's result in the words of `nft list table`.
package nftables
