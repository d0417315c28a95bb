package ipvs

import (
	"errors"

	"signalbox/node"
	"signalbox/proxier"
)

// Init makes the device and the kernel settings that the mode needs, so that a
// Proxier finds them made and needs no right to them.
func Init(opts proxier.Options) error {
	p, err := New(opts)
	if err != nil {
		return err
	}
	return errors.Join(p.prepare(), node.JoinProblems(p.problems), p.Close())
}
