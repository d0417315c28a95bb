// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"slices"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// CheckFamilies compares the addresses in the configuration with the IP families
// that the node serves. As with kube-proxy, it is an error if no Pod range is of a
// served family. Other mismatches are warnings.
func (c *Config) CheckFamilies(served []plan.Family, mode proxier.Mode) (warnings []string, err error) {
	has := func(prefixes []netip.Prefix, family plan.Family) bool {
		return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return plan.FamilyOf(p.Addr()) == family })
	}
	s := c.ForMode(mode)
	ranges := s.ClusterCIDRs
	if s.DetectLocal != service.DetectLocalClusterCIDR {
		ranges = nil
	}
	if len(ranges) > 0 && !slices.ContainsFunc(served, func(f plan.Family) bool { return has(ranges, f) }) {
		return nil, fmt.Errorf("the Pods' ranges (--cluster-cidr, or clusterCIDR in a file) are %v, and this node serves %v only: give a range of that family, or another --detect-local-mode", ranges, served)
	}
	for _, family := range served {
		if len(ranges) > 0 && !has(ranges, family) {
			warnings = append(warnings, fmt.Sprintf("the Pods' ranges are %v: Pods cannot be told from other traffic in %s", ranges, family))
		}
		if at := s.NodePortAddresses; !at.Primary && len(at.CIDRs) > 0 && !has(at.CIDRs, family) {
			warnings = append(warnings, fmt.Sprintf("NodePorts are to be served inside %v: in %s they are served at all addresses", at.CIDRs, family))
		}
	}
	warnings = append(warnings, c.localhostWarnings(&s, served, mode)...)
	for name, at := range map[string]netip.AddrPort{"health": c.HealthzBindAddress, "metrics": c.MetricsBindAddress} {
		if at.IsValid() && !slices.Contains(served, plan.FamilyOf(at.Addr().Unmap())) {
			warnings = append(warnings, fmt.Sprintf("the address of %s, %s, is of a family in which this node serves no Services", name, at))
		}
	}
	return warnings, nil
}

// localhostWarnings names the configured loopback addresses on which the mode does
// not serve NodePorts.
func (c *Config) localhostWarnings(s *service.Settings, served []plan.Family, mode proxier.Mode) (warnings []string) {
	for _, family := range served {
		if !s.NodePortAddresses.NamesLocalhost(family) || s.ServesLocalhost(family) {
			continue
		}
		why := fmt.Sprintf("mode %s cannot; use the mode nftables", mode.Name())
		switch by := mode.Traits().Localhost; {
		case by == proxier.LocalhostByRelay:
			why = fmt.Sprintf("the feature gate %s is off; remove it", gateLocalhostNodePorts)
		case by == proxier.LocalhostByRoute && family == plan.IPv4:
			why = "--iptables-localhost-nodeports, or iptables.localhostNodePorts in a file, is false; remove it"
		case by == proxier.LocalhostByRoute:
			why = fmt.Sprintf("mode %s can in IPv4 only; use the mode nftables", mode.Name())
		}
		warnings = append(warnings, fmt.Sprintf("NodePorts are to be served on loopback, and are not on %s: %s", plan.Localhost(family), why))
	}
	return warnings
}
