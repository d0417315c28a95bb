// Package node knows this node's own side: which addresses its interfaces have,
// which IP families work, and the kernel settings that Services need. It acts
// in the network namespace of the calling thread.
package node
