package service

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"signalbox/proxier/plan"
)

// readClusterIPs returns at most one address of each family.
func readClusterIPs(p *plan.Problems, obj *corev1.Service) []netip.Addr {
	texts, field := obj.Spec.ClusterIPs, "spec.clusterIPs"
	if len(texts) == 0 {
		texts, field = []string{obj.Spec.ClusterIP}, "spec.clusterIP"
	}
	var out []netip.Addr
	for i, text := range texts {
		at := field
		if field == "spec.clusterIPs" {
			at = indexed(field, i)
		}
		a, ok := readAddr(p, at, text)
		switch {
		case !ok:
		case i < len(obj.Spec.IPFamilies) && string(obj.Spec.IPFamilies[i]) != plan.FamilyOf(a).String():
			p.Add(at, "%s is not an %s address, which %s promises; it is left out", a, obj.Spec.IPFamilies[i], indexed("spec.ipFamilies", i))
		case slices.ContainsFunc(out, func(o netip.Addr) bool { return plan.FamilyOf(o) == plan.FamilyOf(a) }):
			p.Add(at, "%s is a second %s address; it is left out", a, plan.FamilyOf(a))
		default:
			out = append(out, a)
		}
	}
	return out
}

func readExternalIPs(p *plan.Problems, texts []string) []netip.Addr {
	var out addrSet
	for i, text := range texts {
		field := indexed("spec.externalIPs", i)
		a, ok := readAddr(p, field, text)
		switch {
		case !ok:
		case !routable(a):
			p.Add(field, "%s is a link-local address; it is left out", a)
		default:
			out.add(a)
		}
	}
	return out.addrs
}

// readIngressIPs leaves out host names, and addresses whose load balancer
// answers by itself (ipMode Proxy, KEP-1860).
func readIngressIPs(p *plan.Problems, ingress []corev1.LoadBalancerIngress) []netip.Addr {
	var out addrSet
	for i, in := range ingress {
		if in.IP == "" || in.IPMode != nil && *in.IPMode != corev1.LoadBalancerIPModeVIP {
			continue
		}
		if a, ok := readAddr(p, indexed("status.loadBalancer.ingress", i)+".ip", in.IP); ok {
			out.add(a)
		}
	}
	return out.addrs
}

// addrSet keeps the order in which addresses first come. What is searched is
// a map, as nothing bounds the number of addresses in an object.
type addrSet struct {
	addrs []netip.Addr
	seen  map[netip.Addr]struct{}
}

func (s *addrSet) add(a netip.Addr) {
	if _, twice := s.seen[a]; twice {
		return
	}
	if s.seen == nil {
		s.seen = map[netip.Addr]struct{}{}
	}
	s.seen[a] = struct{}{}
	s.addrs = append(s.addrs, a)
}

// readSources keeps what can be read. Where a family's ranges were all
// malformed it admits nobody, so that a typing error never opens a Service.
func (s *svc) readSources(p *plan.Problems, ranges []string) {
	malformed := false
	for i, text := range ranges {
		prefix, ok := ParsePrefix(strings.TrimSpace(text))
		if !ok {
			malformed = true
			p.Add(indexed("spec.loadBalancerSourceRanges", i), "%q is not a CIDR; it admits nobody", text)
			continue
		}
		s.sources = append(s.sources, prefix)
	}
	slices.SortFunc(s.sources, netip.Prefix.Compare)
	s.sources = slices.Compact(s.sources)
	if !malformed {
		return
	}
	for _, family := range plan.Families {
		if !slices.ContainsFunc(s.sources, func(x netip.Prefix) bool { return plan.FamilyOf(x.Addr()) == family }) {
			s.deniedFamilies = append(s.deniedFamilies, family)
		}
	}
}

// sourcesOf returns the source ranges of one family as Frontend.Sources wants
// them: nil where everybody is admitted.
func (s *svc) sourcesOf(family plan.Family) []netip.Prefix {
	if slices.Contains(s.deniedFamilies, family) {
		return []netip.Prefix{}
	}
	var out []netip.Prefix
	for _, prefix := range s.sources {
		if plan.FamilyOf(prefix.Addr()) != family {
			continue
		}
		if prefix.Bits() == 0 {
			return nil
		}
		out = append(out, prefix)
	}
	return out
}
