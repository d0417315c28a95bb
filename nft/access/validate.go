// SPDX-License-Identifier: Apache-2.0

package access

import (
	"fmt"
	"slices"
	"time"

	"signalbox/nft"
	"signalbox/proxier/plan"
)

// ValidateNode returns an error if the facts cannot be written as rules.
func ValidateNode(f *nft.IPFamily, n plan.Node) error {
	for _, p := range slices.Concat(n.LocalPods.Prefixes, n.OwnPods, n.ServiceCIDRs) {
		if !p.IsValid() || !f.Holds(p.Addr()) {
			return fmt.Errorf("node: prefix %s is not of %s", p, f.Family)
		}
	}
	for _, s := range n.RouteSources {
		if !f.Holds(s.Destination.Addr()) || s.Source.IsValid() && !f.Holds(s.Source) {
			return fmt.Errorf("node: the route source %s is not of %s", s, f.Family)
		}
	}
	for _, at := range n.Bypass {
		if !f.Holds(at.Addr()) {
			return fmt.Errorf("node: address of an API server %s is not of %s", at, f.Family)
		}
	}
	for _, a := range n.NodePortAddrs.Addrs {
		if !f.Holds(a) {
			return fmt.Errorf("node: address for NodePorts %s is not of %s", a, f.Family)
		}
	}
	return nil
}

// ValidatePort returns an error if the Service port cannot be written. The error names
// the fault.
func ValidatePort(f *nft.IPFamily, port *plan.ServicePort) error {
	if port.AffinityTimeout < 0 || port.AffinityTimeout%time.Second != 0 {
		return fmt.Errorf("session affinity timeout %v is not in whole seconds", port.AffinityTimeout)
	}
	for i := range port.Frontends {
		if err := validateFrontend(f, &port.Frontends[i], port.Name.Protocol); err != nil {
			return err
		}
	}
	return nil
}

func validateFrontend(f *nft.IPFamily, fe *plan.Frontend, p plan.Protocol) error {
	switch {
	case fe.Addr.IsValid() && !f.Holds(fe.Addr):
		return fmt.Errorf("%s %s is not an %s address", fe.Kind, fe.Addr, f.Family)
	case fe.Port == 0:
		return fmt.Errorf("%s has port 0", fe.Kind)
	case fe.Internal == nil || fe.External == nil:
		return fmt.Errorf("%s %s lacks an endpoint set", fe.Kind, fe.Key(p))
	}
	for _, source := range fe.Sources {
		if !source.IsValid() || !f.Holds(source.Addr()) {
			return fmt.Errorf("%s %s: source range %s is not of %s", fe.Kind, fe.Key(p), source, f.Family)
		}
	}
	for _, set := range []*plan.EndpointSet{fe.Internal, fe.External} {
		for _, e := range set.Endpoints {
			if !f.Holds(e.Addr()) {
				return fmt.Errorf("endpoint %s is not an %s address", e.AddrPort, f.Family)
			}
			if e.Port() == 0 {
				return fmt.Errorf("endpoint %s has port 0", e.AddrPort)
			}
		}
	}
	return nil
}
