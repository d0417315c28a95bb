// SPDX-License-Identifier: Apache-2.0

package proxier

import (
	"cmp"
	"fmt"
)

// Difference is what differs in the kernel from what a Proxier wrote.
type Difference struct {
	// Objects says what differs, one text for each kind of objects; none if nothing does.
	Objects []string
	// NeedsFullWrite says that nothing is repaired yet: the caller's next change has All set.
	NeedsFullWrite bool
}

// Comparison is what the kernel has, beside what a Proxier wrote. Its lines are in the words
// of the kernel's tool.
type Comparison struct {
	// Differences has a line with "-" for what is missing in the kernel, and one with "+"
	// for what is not signalbox's. Other lines say in words what differs.
	Differences []string
	// Holds is what the kernel has as it was written. It is empty in a comparison of
	// everything.
	Holds []string
	// Before are rules of other software that packets meet before signalbox's. They may
	// take packets from these, and that is no difference.
	Before []string
}

// Writer is a process that wrote to the kernel. It is zero if the kernel does not tell.
type Writer struct {
	Name string
	PID  uint32 // in the machine's first PID namespace
}

// Program is the name, or a word for it.
func (w Writer) Program() string { return cmp.Or(w.Name, "unknown") }

// String is the name and the number.
func (w Writer) String() string {
	if w.Name == "" {
		return w.Program()
	}
	return fmt.Sprintf("%s (%d)", w.Name, w.PID)
}
