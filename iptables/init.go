package iptables

import (
	"errors"

	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Init makes the kernel setting that NodePorts on 127.0.0.1 need, where they
// are wanted, so that a Proxier finds it made and needs no right to it.
func Init(opts proxier.Options, localhost bool) error {
	p, err := New(opts)
	if err != nil {
		return err
	}
	err = p.prepareNode(&plan.Node{LocalhostNodePorts: localhost})
	return errors.Join(err, node.JoinProblems(p.problems), p.Close())
}
