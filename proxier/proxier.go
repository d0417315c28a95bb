// SPDX-License-Identifier: Apache-2.0

package proxier

import (
	"context"
	"net/netip"

	"signalbox/node"
	"signalbox/proxier/plan"
)

// Proxier is one mode at work in one IP family. It is used by one goroutine at
// a time, except for the methods that say otherwise. Defaults has all methods but
// Sync and Close.
type Proxier interface {
	// Sync makes the kernel do what plan says. It looks only at what change
	// names, and its cost follows from that, not from the size of plan; the
	// first call, and every call with change.All, writes everything.
	//
	// Sync is atomic: after an error the kernel does what it did before, the
	// Proxier remembers what it remembered before, and the caller may try
	// again with the same or with a smaller change. A mode that cannot keep
	// that promise in some case returns an error that wraps ErrUnknownState,
	// and the caller's next change has All set.
	Sync(ctx context.Context, plan *plan.Plan, change plan.Change) error
	// Watch calls drifted when other software may have changed what the mode has in the
	// kernel, until ctx ends. What Sync writes does not count. Any goroutine may call
	// Watch, one at a time.
	// Default: returns at once.
	Watch(ctx context.Context, drifted func(Writer))
	// Repair reads what the kernel has, compares it with what Sync wrote, and writes the
	// difference, or asks for a Sync with change.All. Connections go on. After an error
	// the caller's next change has All set. signalbox reads only after drifted.
	// Default: nothing differs.
	Repair(ctx context.Context) (Difference, error)
	// Compare reads what the kernel has and compares it with what Sync wrote: all of it,
	// or what is there for the named Service ports. It writes nothing. Before the first
	// Sync that succeeds, and while the kernel's state is unknown, the error wraps
	// ErrNothingWritten.
	// Default: an error that wraps ErrNotCompared.
	Compare(ctx context.Context, about ...plan.ServicePortName) (Comparison, error)
	// Close closes what the Proxier holds (sockets, buffers). The rules stay in
	// the kernel and go on working.
	Close() error

	// Counts returns what the mode keeps in the kernel. It is called after each
	// Sync, so it must cost next to nothing beside a Sync, at any size.
	// Default: nothing is counted.
	Counts() []KernelObjects
	// Problem says how a Service port is served now otherwise than it asks for. It is
	// called after a Sync that succeeded, for each Service port that Sync has
	// written, and when somebody asks for the Service. Equal Problems of a Service's
	// ports and families are reported once.
	// Default: none.
	Problem(plan.ServicePortName) (p plan.Problem, found bool)
	// KernelProblems returns the kernel settings that the mode needs and that the
	// last Sync could not make.
	// Default: none.
	KernelProblems() []*node.KernelProblem

	// Pause stops writing to the kernel and accepting connections, because another
	// process serves the node now. It returns once nothing is being written.
	// Connections that this process relays go on. The next Sync, which has
	// change.All, ends the pause.
	// Default: nothing, for a mode that acts only in Sync.
	Pause()
	// Relays says whether connections pass through this process. They end with
	// Close. Any goroutine may call it.
	// Default: no.
	Relays() bool
	// Drain waits until no connection passes through this process, or ctx ends.
	// Any goroutine may call it.
	// Default: returns at once.
	Drain(ctx context.Context)
	// RelayPrefix holds the addresses to which the mode translates the destination
	// of UDP flows that it relays. Their conntrack entries stay, because the relay
	// chooses the endpoint.
	// Default: not valid, for a mode that relays no UDP flow.
	RelayPrefix() netip.Prefix
	// RelayStats returns the relay's counts, also after Close. Any goroutine may
	// call it.
	// Default: not ok, for a mode without a relay.
	RelayStats() (stats RelayStats, ok bool)
	// LocalhostStats returns the counts of listeners that serve NodePorts on the
	// loopback address, also after Close. Any goroutine may call it.
	// Default: not Serving.
	LocalhostStats() LocalhostStats

	// TakenOver says which objects of kube-proxy are this Proxier's now. Any
	// goroutine may call it.
	// Default: none.
	TakenOver() TakenOver
	// Intact says whether the rules in the kernel are still this mode's. Another
	// program may have replaced them without an error in Sync. Any goroutine may
	// call it.
	// Default: yes, for a mode with a table of its own.
	Intact(ctx context.Context) (bool, error)
}

// Defaults are the answers of a mode that only writes rules. A Proxier embeds it.
type Defaults struct{}

// Watch implements Proxier.
func (Defaults) Watch(context.Context, func(Writer)) {}

// Repair implements Proxier.
func (Defaults) Repair(context.Context) (Difference, error) { return Difference{}, nil }

// Compare implements Proxier.
func (Defaults) Compare(context.Context, ...plan.ServicePortName) (Comparison, error) {
	return Comparison{}, ErrNotCompared
}

// Counts implements Proxier.
func (Defaults) Counts() []KernelObjects { return nil }

// Problem implements Proxier.
func (Defaults) Problem(plan.ServicePortName) (plan.Problem, bool) { return plan.Problem{}, false }

// KernelProblems implements Proxier.
func (Defaults) KernelProblems() []*node.KernelProblem { return nil }

// Pause implements Proxier.
func (Defaults) Pause() {}

// Relays implements Proxier.
func (Defaults) Relays() bool { return false }

// Drain implements Proxier.
func (Defaults) Drain(context.Context) {}

// RelayPrefix implements Proxier.
func (Defaults) RelayPrefix() netip.Prefix { return netip.Prefix{} }

// RelayStats implements Proxier.
func (Defaults) RelayStats() (RelayStats, bool) { return RelayStats{}, false }

// LocalhostStats implements Proxier.
func (Defaults) LocalhostStats() LocalhostStats { return LocalhostStats{} }

// TakenOver implements Proxier.
func (Defaults) TakenOver() TakenOver { return TakenOver{} }

// Intact implements Proxier.
func (Defaults) Intact(context.Context) (bool, error) { return true, nil }
