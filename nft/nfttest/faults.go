// SPDX-License-Identifier: Apache-2.0

package nfttest

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// Fault is a way in which the next transaction fails.
type Fault struct {
	Name string
	Play func(*Kernel)
	// IsKnown says that the kernel surely holds what the connection wrote before.
	IsKnown bool
	// IsDone says that the kernel performs the transaction all the same.
	IsDone bool
}

// Faults are those that a mode must survive.
var Faults = []Fault{
	{"refused for want of memory", func(k *Kernel) { k.RefuseMessage(0, unix.ENOMEM) }, true, false},
	{"refused for want of buffers", func(k *Kernel) { k.RefuseMessage(0, unix.ENOBUFS) }, true, false},
	{"interrupted", func(k *Kernel) { k.RefuseMessage(0, unix.EINTR) }, true, false},
	{"refused because of a use", func(k *Kernel) { k.RefuseMessage(0, unix.EBUSY) }, false, false},
	{"lost", func(k *Kernel) { k.LoseAnswer(false) }, false, false},
	{"done, and the answer is lost", func(k *Kernel) { k.LoseAnswer(true) }, false, true},
}

// RefuseMessage refuses message n, counted from 0, of the next transaction that has so many.
func (k *Kernel) RefuseMessage(n int, errno syscall.Errno) {
	k.Refuse = func(i, kind int) syscall.Errno {
		if i != n || isListing(kind) {
			return 0
		}
		k.Refuse = nil
		return errno
	}
}
