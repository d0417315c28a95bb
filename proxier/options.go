// SPDX-License-Identifier: Apache-2.0

package proxier

import (
	"time"

	"signalbox/proxier/plan"
)

// Options is what every mode needs to know to be made.
type Options struct {
	Family plan.Family
	// MasqueradeMark is the one bit of the packet mark that asks for the
	// source address to be rewritten: kube-proxy's 0x4000 by default.
	MasqueradeMark uint32
	// IPVS is for a mode with Traits.Schedulers alone.
	IPVS IPVSTuning
}

// IPVSTuning is what an operator can choose about IPVS.
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
