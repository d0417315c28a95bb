// SPDX-License-Identifier: Apache-2.0

package proxier

import (
	"errors"
	"fmt"

	"signalbox/proxier/plan"
)

// ErrUnknownState says that a failed Sync may have changed part of the kernel's
// state. See Proxier.
var ErrUnknownState = errors.New("the kernel may hold part of the change")

// ErrUnknownOwner says that the kernel has objects whose names signalbox and
// kube-proxy share, and that nothing on this node can tell who wrote them.
var ErrUnknownOwner = errors.New("signalbox or kube-proxy may have written it")

// ErrNotCompared says that a mode cannot compare the kernel with what it wrote.
var ErrNotCompared = errors.New("this mode does not read back what it wrote")

// ErrNothingWritten says that there is nothing to compare the kernel with.
var ErrNothingWritten = errors.New("nothing is written yet, or a sync that failed left the kernel's state unknown")

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
