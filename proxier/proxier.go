package proxier

import (
	"context"
	"fmt"
	"time"

	"signalbox/proxier/plan"
)

// Proxier is one mode at work in one IP family. It is used by one goroutine at
// a time.
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
	// Close lets go of what the Proxier holds (sockets, buffers). The rules
	// stay in the kernel and go on working.
	Close() error
}

// Options is what every mode needs to know to be made.
type Options struct {
	Family plan.Family
	// MasqueradeMark is the one bit of the packet mark that asks for the
	// source address to be rewritten: kube-proxy's 0x4000 by default.
	MasqueradeMark uint32
	// IPVS is for the mode ipvs alone.
	IPVS IPVSTuning
}

// IPVSTuning is what an operator can choose about the mode ipvs.
type IPVSTuning struct {
	// Scheduler is the kernel's name of one; "" for rr.
	Scheduler string
	// StrictARP makes the node answer ARP only for addresses of the interface
	// asked.
	StrictARP bool
	// How long an idle connection is remembered; 0 leaves the kernel's value.
	// TCPFinTimeout is for one that one side has closed.
	TCPTimeout, TCPFinTimeout, UDPTimeout time.Duration
}

// DefaultMasqueradeMark is bit 14 (--iptables-masquerade-bit), which other
// software on a node knows as kube-proxy's.
const DefaultMasqueradeMark uint32 = 1 << 14

// ErrUnknownState says that a failed Sync may have changed part of the kernel's
// state. See Proxier.
var ErrUnknownState = fmt.Errorf("the kernel may hold part of the change")

// UnsupportedError says why a mode cannot work on this node.
type UnsupportedError struct {
	Mode   string
	Family plan.Family
	// Missing names the kernel feature or the program that is not there.
	Missing string
	// Remedy is what an operator can do about it.
	Remedy string
	// Err is what the attempt to use it answered; may be nil.
	Err error
}

// Error names the mode, what is missing, the kernel's own answer and the
// remedy.
func (e *UnsupportedError) Error() string {
	s := fmt.Sprintf("mode %s cannot serve %s: %s is missing", e.Mode, e.Family, e.Missing)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

// Unwrap returns the answer of the kernel or of the program that was tried.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// KernelObjects counts what a mode keeps in the kernel, of one kind and in one
// table.
type KernelObjects struct {
	// Table is the name of an nftables or iptables table, and empty for what
	// is in none.
	Table string
	// Kind is "chain", "rule", "element", "virtual-server", "real-server" or
	// "address".
	Kind string
	// Count are there now; Written of them, or in their place, were written by
	// the last sync. Written is 0 in modes that do not count it.
	Count, Written int
}

// Counter is implemented by Proxiers that know what they keep in the kernel.
type Counter interface {
	// Counts is called after each Sync by the same goroutine, so that it must
	// cost next to nothing beside a Sync, at any size.
	Counts() []KernelObjects
}

// Reporter is implemented by Proxiers that may serve a Service port otherwise
// than it asks for.
type Reporter interface {
	// Problem says how, of a Service port as it is in the kernel. It is called
	// after a Sync that succeeded, for each Service port that Sync has written,
	// by the same goroutine. Equal Problems of a Service's ports and families are
	// told once, for as long as there is one.
	Problem(plan.ServicePortName) (p plan.Problem, found bool)
}
