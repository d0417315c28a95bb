// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"signalbox/proxier/plan"
)

// Question asks about a frontend, or about a Service.
type Question struct {
	// Text is the question as it was asked, and Target its part without the client.
	Text, Target string
	// Address is not valid for a question about a Service.
	Address netip.AddrPort
	// Protocol is 0 for a Service's ports of any protocol.
	Protocol plan.Protocol
	// Service has the ports that Port names: by name, by number, or all if it is empty.
	Service plan.ServiceName
	Port    string
	// ByDNS says that the question has the DNS name of a Service, which stands for its
	// cluster IPs.
	ByDNS bool
	// From is the client's address; not valid for any client.
	From netip.Addr
}

// ParseQuestion reads HOST:PORT[/PROTO] or namespace/service[:port][/PROTO], and the
// address of a client, which may be empty. HOST may be the DNS name of a Service.
func ParseQuestion(target, from string) (Question, error) {
	q := Question{Text: target, Target: target}
	if from != "" {
		q.Text += " from " + from
		a, err := netip.ParseAddr(from)
		if err != nil {
			return q, fmt.Errorf("--from=%s: give the IP address of a client, such as 10.244.1.12", from)
		}
		q.From = a.Unmap()
	}
	rest, protocol := cutProtocol(target)
	if host, port, err := net.SplitHostPort(rest); err == nil && !strings.Contains(host, "/") {
		return q.withHost(host, port, protocol)
	}
	if !strings.Contains(rest, "/") { // as for a Service named "tcp"
		rest, protocol = target, 0
	}
	namespace, name, slash := strings.Cut(rest, "/")
	name, q.Port, _ = strings.Cut(name, ":")
	if !slash || namespace == "" || strings.ContainsAny(namespace, ".:") || name == "" || strings.Contains(name, "/") {
		return q, fmt.Errorf("%q is neither HOST:PORT[/PROTO], such as 10.96.0.10:80 or [fd00::a]:53/udp, nor namespace/service[:port]", target)
	}
	q.Service, q.Protocol = plan.ServiceName{Namespace: namespace, Name: name}, protocol
	return q, nil
}

// withHost completes a question about an address, or about a Service's DNS name.
func (q Question) withHost(host, port string, protocol plan.Protocol) (Question, error) {
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return q, fmt.Errorf("%q in %q is not a port from 1 to 65535", port, q.Text)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if q.From.IsValid() && q.From.Is4() != a.Unmap().Is4() {
			return q, fmt.Errorf("--from=%s is of another IP family than %s", q.From, host)
		}
		q.Address, q.Protocol = netip.AddrPortFrom(a.Unmap(), uint16(number)), cmp.Or(protocol, plan.TCP)
		return q, nil
	}
	labels := strings.Split(host, ".")
	if len(labels) < 3 || labels[2] != "svc" {
		return q, fmt.Errorf("%q in %q is neither an IP address nor the DNS name of a Service, such as web.default.svc", host, q.Text)
	}
	q.Service, q.Port, q.Protocol = plan.ServiceName{Namespace: labels[1], Name: labels[0]}, port, cmp.Or(protocol, plan.TCP)
	q.ByDNS = true
	return q, nil
}

// cutProtocol removes "/tcp", "/udp" or "/sctp" from the end of a text.
func cutProtocol(text string) (rest string, protocol plan.Protocol) {
	slash := strings.LastIndex(text, "/")
	i := slices.IndexFunc(plan.Protocols, func(p plan.Protocol) bool { return strings.EqualFold(text[slash+1:], p.String()) })
	if slash < 0 || i < 0 {
		return text, 0
	}
	return text[:slash], plan.Protocols[i]
}

// includes says whether the client can have an address of the family.
func (q *Question) includes(family plan.Family) bool {
	return !q.From.IsValid() || plan.FamilyOf(q.From) == family
}

// asksFor says whether the question is about a frontend of a Service port.
func (q *Question) asksFor(sp *plan.ServicePort, f *plan.Frontend, key plan.FrontendKey) bool {
	if q.Address.IsValid() {
		return f.Key(sp.Name.Protocol) == key
	}
	return q.names(sp) && (!q.ByDNS || f.Kind == plan.ClusterIP)
}

// names says whether the question names a port of a Service.
func (q *Question) names(sp *plan.ServicePort) bool {
	if q.Protocol != 0 && q.Protocol != sp.Name.Protocol {
		return false
	}
	return q.Port == "" || q.Port == sp.Name.Port || q.Port == strconv.Itoa(portNumber(sp))
}

// portNumber is the number of a Service port: each Service that is served has a
// cluster IP, and its frontend is the first. 0 if there are no frontends.
func portNumber(sp *plan.ServicePort) int {
	if len(sp.Frontends) == 0 {
		return 0
	}
	return int(sp.Frontends[0].Port)
}
