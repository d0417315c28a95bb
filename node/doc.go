// SPDX-License-Identifier: Apache-2.0

// Package node reads and changes this node's own state: the addresses of its
// interfaces, the usable IP families, and the kernel settings that Services need.
// It acts in the network namespace of the calling thread.
package node
