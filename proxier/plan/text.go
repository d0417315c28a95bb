// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
)

// String returns the plan as text: the node first, then the Service ports in
// the order of their names, each with its frontends and the endpoint sets that
// these refer to by letter. Equal plans have equal texts. For example:
//
//	IPv4
//	  local pods: 10.244.1.0/24
//	  node ports: all addresses
//	  service CIDRs: 10.96.0.0/12
//	default/web:http/tcp, affinity 3h0m0s
//	  cluster IP 10.96.0.10:80 -> a, masquerade node outside, else reject
//	  node port 30080 -> a, from outside -> b, masquerade node, else drop
//	  a: 10.244.1.5:8080* 10.244.2.6:8080
//	  b: 10.244.1.5:8080*
//	  serving: a
//
// A star marks an endpoint that may hairpin, and =3 one of weight 3.
func (p *Plan) String() string {
	var b strings.Builder
	fmt.Fprintln(&b, p.Family)
	p.Node.print(&b)
	for _, name := range p.Names() {
		p.Services[name].print(&b)
	}
	return b.String()
}

func (n *Node) print(w io.Writer) {
	pods := "not told apart"
	switch l := n.LocalPods; {
	case len(l.Prefixes) > 0:
		pods = join(l.Prefixes)
	case l.Interface != "":
		pods = "interface " + l.Interface
	case l.InterfacePrefix != "":
		pods = "interfaces " + l.InterfacePrefix + "*"
	}
	fmt.Fprintf(w, "  local pods: %s\n", pods)

	if len(n.OwnPods) > 0 {
		fmt.Fprintf(w, "  own pods: %s\n", join(n.OwnPods))
	}
	at := join(n.NodePortAddrs.Addrs)
	if n.NodePortAddrs.All {
		at = "all addresses"
	}
	if n.LocalhostNodePorts {
		at += ", localhost"
	}
	fmt.Fprintf(w, "  node ports: %s\n", at)
	fmt.Fprintf(w, "  service CIDRs: %s\n", join(n.ServiceCIDRs))
	for _, s := range n.RouteSources {
		fmt.Fprintf(w, "  source by %s\n", s)
	}
	if len(n.Bypass) > 0 {
		fmt.Fprintf(w, "  API servers past Services: %s\n", join(n.Bypass))
	}
}

// String returns for example "eth0 to 10.0.0.0/8: 192.0.2.1".
func (s RouteSource) String() string {
	source := "masquerade"
	if s.Source.IsValid() {
		source = s.Source.String()
	}
	return fmt.Sprintf("%s to %s: %s", s.Link, s.Destination, source)
}

func (p *ServicePort) print(w io.Writer) {
	fmt.Fprintf(w, "%s/%s", p.Name, p.Name.Protocol)
	if p.AffinityTimeout != 0 {
		fmt.Fprintf(w, ", affinity %v", p.AffinityTimeout)
	}
	if p.HealthCheckNodePort != 0 {
		fmt.Fprintf(w, ", health check on %d with %d local endpoints", p.HealthCheckNodePort, p.LocalEndpoints)
	}
	if p.Scheduler != "" {
		fmt.Fprintf(w, ", scheduler %s", p.Scheduler)
	}
	fmt.Fprintln(w)
	letters := setLetters{}
	for i := range p.Frontends {
		p.Frontends[i].print(w, &letters)
	}
	serving := letters.of(p.Usable)
	listed := letters.of(p.Listed)
	for i, set := range letters.sets {
		fmt.Fprintf(w, "  %s: %s\n", letter(i), set)
	}
	fmt.Fprintf(w, "  serving: %s\n", serving)
	if p.Listed != nil {
		fmt.Fprintf(w, "  listed: %s\n", listed)
	}
}

func (f *Frontend) print(w io.Writer, letters *setLetters) {
	fmt.Fprintf(w, "  %s ", f.Kind)
	if f.Kind == NodePort {
		fmt.Fprint(w, f.Port)
	} else {
		fmt.Fprint(w, netip.AddrPortFrom(f.Addr, f.Port))
	}
	fmt.Fprintf(w, " -> %s", letters.of(f.Internal))
	if f.External != f.Internal {
		fmt.Fprintf(w, ", from outside -> %s", letters.of(f.External))
	}
	fmt.Fprintf(w, ", masquerade %s, else %s", f.Masquerade, f.WhenEmpty)
	if f.Sources != nil {
		fmt.Fprintf(w, ", only from %s", join(f.Sources))
	}
	if len(f.Bypass) > 0 {
		fmt.Fprintf(w, ", not from node to %s", join(f.Bypass))
	}
	if f.ForeignAddr {
		fmt.Fprint(w, ", address of an API server")
	}
	fmt.Fprintln(w)
}

// String returns for example "node outside", or "nobody".
func (o TrafficSources) String() string {
	var words []string
	for _, origin := range []struct {
		bit  TrafficSources
		word string
	}{{FromPods, "pods"}, {FromNode, "node"}, {FromOutside, "outside"}} {
		if o&origin.bit != 0 {
			words = append(words, origin.word)
		}
	}
	if len(words) == 0 {
		return "nobody"
	}
	return strings.Join(words, " ")
}

// String returns the endpoints with a star after each that may hairpin and the
// weights above 1, or "nobody" for an empty set.
func (s *EndpointSet) String() string {
	if s.Len() == 0 {
		return "nobody"
	}
	words := make([]string, len(s.Endpoints))
	for i, e := range s.Endpoints {
		words[i] = e.AddrPort.String()
		if e.MayHairpin {
			words[i] += "*"
		}
		if e.Weight > 1 {
			words[i] += fmt.Sprintf("=%d", e.Weight)
		}
	}
	return strings.Join(words, " ")
}

// setLetters names the endpoint sets of one Service port in the order in which
// they are first asked for.
type setLetters struct{ sets []*EndpointSet }

func (l *setLetters) of(s *EndpointSet) string {
	if s.Len() == 0 {
		return "nobody"
	}
	i := slices.Index(l.sets, s)
	if i < 0 {
		i = len(l.sets)
		l.sets = append(l.sets, s)
	}
	return letter(i)
}

// letter is a, b, c: a Service port has no more sets.
func letter(i int) string { return string(rune('a' + i)) }

func join[T fmt.Stringer](values []T) string {
	if len(values) == 0 {
		return "none"
	}
	words := make([]string, len(values))
	for i, v := range values {
		words[i] = v.String()
	}
	return strings.Join(words, " ")
}
