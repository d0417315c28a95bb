// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"signalbox/internal/localhost"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// reference is the plainest mode that can be: it writes every plan anew, as
// the text of an nft script, one rule per thing to do. It exists so that the
// contract and the resolver can be tested by themselves, and a scenario that
// fails for another mode can be told to be that mode's fault.
type reference struct {
	proxier.Defaults
	family plan.Family
	chains []string
	sets   []string

	localhost *localhost.NodePorts
}

func newReference(o proxier.Options) (proxier.Proxier, error) { return referenceOf(o), nil }

func referenceOf(o proxier.Options) *reference {
	return &reference{family: o.Family, localhost: localhost.New(o.Family, "reference")}
}

func (r *reference) Close() error {
	r.localhost.Close()
	return nil
}

func (r *reference) Sync(ctx context.Context, desired *plan.Plan, _ plan.Change) error {
	s := &script{ip: "ip", family: desired.Family}
	if desired.Family == plan.IPv6 {
		s.ip = "ip6"
	}
	s.base(desired.Node)
	var nodePorts, clusterIPs []string
	for name, sp := range desired.Services {
		for i := range sp.Frontends {
			f := &sp.Frontends[i]
			chain := fmt.Sprintf("fe-%s-%s-%s-%d", name.Namespace, name.Name, name.Port, len(s.chains))
			if f.Kind == plan.NodePort {
				nodePorts = append(nodePorts, fmt.Sprintf("%s %s dport %d goto %s", s.nodeAddrs(desired.Node), name.Protocol, f.Port, chain))
			} else {
				s.rule("services", "%s daddr %s %s dport %d goto %s", s.ip, f.Addr, name.Protocol, f.Port, chain)
			}
			if f.Kind == plan.ClusterIP {
				clusterIPs = append(clusterIPs, f.Addr.String())
			}
			if desired.Node.ResetStrays && name.Protocol == plan.TCP {
				match := fmt.Sprintf("%s daddr %s", s.ip, f.Addr)
				if f.Kind == plan.NodePort {
					match = s.nodeAddrs(desired.Node)
				}
				s.rule("strays", "%s tcp dport %d reject with tcp reset", match, f.Port)
			}
			s.frontend(chain, desired.Node, sp, f)
		}
	}
	for _, rule := range nodePorts {
		s.rule("services", "%s", rule)
	}
	if len(clusterIPs) > 0 {
		s.rule("services", "%s daddr { %s } fib daddr type != local meta l4proto { tcp, udp } reject", s.ip, strings.Join(clusterIPs, ", "))
	}
	for _, p := range desired.Node.ServiceCIDRs {
		s.rule("services", "%s daddr %s fib daddr type != local drop", s.ip, p)
	}
	if err := r.load(ctx, s); err != nil {
		return err
	}
	r.localhost.Sync(desired, plan.Change{All: true})
	return nil
}

// load replaces the rules but keeps the sets, which hold affinity.
func (r *reference) load(ctx context.Context, s *script) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "add table %s reference\nflush table %s reference\n", s.ip, s.ip)
	for _, c := range r.chains {
		fmt.Fprintf(&b, "delete chain %s reference %s\n", s.ip, c)
	}
	for _, set := range r.sets {
		name, _, _ := strings.Cut(set, " ")
		if !slices.ContainsFunc(s.sets, func(kept string) bool { return strings.HasPrefix(kept, name+" ") }) {
			fmt.Fprintf(&b, "delete set %s reference %s\n", s.ip, name)
		}
	}
	for _, set := range s.sets {
		fmt.Fprintf(&b, "add set %s reference %s\n", s.ip, set)
	}
	for _, c := range s.chains {
		fmt.Fprintf(&b, "add chain %s reference %s\n", s.ip, c)
	}
	b.WriteString(s.rules.String())
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	r.chains, r.sets = nil, s.sets
	for _, c := range s.chains {
		name, _, _ := strings.Cut(c, " ")
		r.chains = append(r.chains, name)
	}
	return nil
}

type script struct {
	family plan.Family
	ip     string
	chains []string
	sets   []string
	rules  strings.Builder
}

func (s *script) rule(chain, format string, args ...any) {
	fmt.Fprintf(&s.rules, "add rule %s reference %s %s\n", s.ip, chain, fmt.Sprintf(format, args...))
}

func (s *script) base(n plan.Node) {
	s.chains = append(s.chains, "services", "local-pods", "new-source",
		"prerouting { type nat hook prerouting priority -100; }", "output { type nat hook output priority -100; }",
		"input { type filter hook input priority 0; }", "postrouting { type nat hook postrouting priority 100; }")
	if n.ResetStrays {
		s.chains = append(s.chains, "before { type filter hook prerouting priority -110; }", "before-output { type filter hook output priority -110; }", "strays")
		for _, from := range []string{"before", "before-output"} {
			s.rule(from, "ct state new tcp flags & (fin | syn | rst | ack) != syn jump strays")
		}
	}
	for _, at := range n.Bypass {
		s.rule("services", "%s daddr %s tcp dport %d fib saddr type local return", s.ip, at.Addr(), at.Port())
	}
	s.rule("prerouting", "jump services")
	s.rule("output", "jump services")
	s.rule("input", "ct state new meta mark & 0x8000 == 0x8000 reject")
	s.rule("postrouting", "meta mark & 0x4000 == 0x4000 meta mark set meta mark ^ 0x4000 goto new-source")
	for _, own := range n.OwnPods {
		s.rule("postrouting", "ct status dnat %s saddr %s %[1]s saddr != %[3]s %[1]s daddr != %[3]s goto new-source", s.ip, n.LocalPods.Prefixes[0], own)
	}
	for _, r := range n.RouteSources {
		source := "masquerade"
		if r.Source.IsValid() {
			source = "snat to " + r.Source.String()
		}
		s.rule("new-source", "oifname %q %s daddr %s %s fully-random", r.Link, s.ip, r.Destination, source)
	}
	s.rule("new-source", "masquerade fully-random")
}

func (s *script) nodeAddrs(n plan.Node) string {
	loopback, nobody := "127.0.0.0/8", "0.0.0.0"
	if s.family == plan.IPv6 {
		loopback, nobody = "::1/128", "::"
	}
	if n.NodePortAddrs.All {
		return fmt.Sprintf("%s daddr != %s fib daddr type local", s.ip, loopback)
	}
	addrs := []string{}
	for _, a := range n.NodePortAddrs.Addrs {
		if !a.IsLoopback() {
			addrs = append(addrs, a.String())
		}
	}
	if len(addrs) == 0 {
		addrs = append(addrs, nobody)
	}
	return fmt.Sprintf("%s daddr { %s }", s.ip, strings.Join(addrs, ", "))
}

func (s *script) frontend(chain string, n plan.Node, sp *plan.ServicePort, f *plan.Frontend) {
	s.chains = append(s.chains, chain, chain+"-int", chain+"-ext")
	if f.Sources != nil {
		s.sources(chain, f.Sources)
	}
	masq := func(o plan.TrafficSources) string {
		if f.Masquerade&o != 0 {
			return "meta mark set meta mark | 0x4000 "
		}
		return ""
	}
	s.rule(chain, "fib saddr type local %sgoto %s-int", masq(plan.FromNode), chain)
	for _, p := range n.LocalPods.Prefixes {
		s.rule(chain, "%s saddr %s %sgoto %s-int", s.ip, p, masq(plan.FromPods), chain)
	}
	if n.LocalPods.Interface != "" {
		s.rule(chain, "iifname %q %sgoto %s-int", n.LocalPods.Interface, masq(plan.FromPods), chain)
	}
	if n.LocalPods.InterfacePrefix != "" {
		s.rule(chain, "iifname \"%s*\" %sgoto %s-int", n.LocalPods.InterfacePrefix, masq(plan.FromPods), chain)
	}
	s.rule(chain, "%sgoto %s-ext", masq(plan.FromOutside), chain)
	s.spread(chain+"-int", sp, f.Internal, f.WhenEmpty)
	s.spread(chain+"-ext", sp, f.External, f.WhenEmpty)
}

func (s *script) sources(chain string, sources []netip.Prefix) {
	if len(sources) == 0 {
		s.rule(chain, "drop")
		return
	}
	var list []string
	for _, p := range sources {
		list = append(list, p.String())
	}
	s.rule(chain, "%s saddr != { %s } drop", s.ip, strings.Join(list, ", "))
}

// spread sends connections to the endpoints of a set. Where a client's own
// address is chosen, its source is rewritten.
func (s *script) spread(chain string, sp *plan.ServicePort, set *plan.EndpointSet, whenEmpty plan.Verdict) {
	if set.Len() == 0 {
		if whenEmpty == plan.Reject {
			// The input hook rejects what the node sends to itself.
			s.rule(chain, "fib saddr type local fib daddr type local meta mark set meta mark | 0x8000 return")
		}
		s.rule(chain, "%s", whenEmpty)
		return
	}
	var numbers []string
	for i, e := range set.Endpoints {
		to := fmt.Sprintf("%s-%d", chain, i)
		s.chains = append(s.chains, to)
		numbers = append(numbers, fmt.Sprintf("%d : goto %s", i, to))
		if sp.AffinityTimeout > 0 {
			sticky := strings.NewReplacer("/", "_", ":", "_", "[", "", "]", "", ".", "_").Replace(sp.Name.String() + e.String() + sp.Name.Protocol.String())
			set := fmt.Sprintf("a%s { typeof %s saddr; flags dynamic, timeout; timeout %ds; size 4096; }", sticky, s.ip, int(sp.AffinityTimeout.Seconds()))
			if !slices.Contains(s.sets, set) {
				s.sets = append(s.sets, set)
			}
			s.rule(chain, "%s saddr @a%s goto %s", s.ip, sticky, to)
			s.rule(to, "update @a%s { %s saddr }", sticky, s.ip)
		}
		s.rule(to, "%s saddr %s meta mark set meta mark | 0x4000", s.ip, e.Addr())
		s.rule(to, "meta l4proto %s dnat to %s", sp.Name.Protocol, e.AddrPort)
	}
	s.rule(chain, "numgen random mod %d vmap { %s }", set.Len(), strings.Join(numbers, ", "))
}
