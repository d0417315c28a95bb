// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// Environment is what an answer needs beside the Loop.
type Environment struct {
	Node, Mode, Origin string
	// Traits are those of the mode.
	Traits proxier.Traits
	// Live says that the Loop writes to this node's kernel.
	Live bool
	// Foreign are the IP families in which rules of another service proxy may be in force.
	Foreign []plan.Family
	// NoDaemon says why the daemon, which was asked first, did not answer; nil if it was not
	// asked.
	NoDaemon error
	// Doubts are those of Answer.Doubts about an IP family.
	Doubts map[plan.Family][]string
	// Problems are lines for Answer.Problems.
	Problems []string
	// Link returns the interface by which this node reaches an address; nil if this
	// is not the node.
	Link func(netip.Addr) string
}

// notRead is the answer before a Loop has read all objects: it may know a Service and not
// its endpoints.
const notRead = "signalbox has not read all objects yet (see signalbox status); what the kernel had before still serves"

// Explain answers a question from what a Loop knows. The Loop's goroutine calls it.
func Explain(l *syncer.Loop, env Environment, q Question) *Answer {
	x := explainer{loop: l, env: env, question: q, answer: &Answer{Question: q.Text, Node: env.Node, Mode: env.Mode, Origin: env.Origin, Problems: env.Problems, client: q.From}}
	if missing, others := l.NodeMissing(); missing && !env.Live { // the daemon lists the problems of its node itself
		x.problem("no Node object is named %q, so the zone and the Pod ranges of this node are not known; there are %q", env.Node, others)
	}
	switch {
	case !l.Progress().Synced:
		x.answer.Sentence = notRead + "."
	case q.Address.IsValid():
		x.address()
	default:
		x.service(q.Service, plan.FrontendKey{}, l.Families())
	}
	if env.NoDaemon != nil {
		x.answer.doubt("Nothing says whether the kernel has this (%v)", env.NoDaemon)
	}
	for _, family := range plan.Families {
		if x.isAbout(family) {
			x.answer.Doubts = append(x.answer.Doubts, env.Doubts[family]...)
		}
	}
	for _, family := range env.Foreign {
		if x.isAbout(family) {
			x.answer.doubt("Rules of another service proxy may be in force for %s, and they come before those of signalbox", family)
		}
	}
	x.answer.judge()
	return x.answer
}

// isAbout says whether the answer is about an IP family.
func (x *explainer) isAbout(family plan.Family) bool {
	if a := x.question.Address; a.IsValid() {
		return plan.FamilyOf(a.Addr()) == family
	}
	return slices.Contains(x.lacking, family) || slices.ContainsFunc(x.answer.Ports, func(p Port) bool { return p.family() == family })
}

func (a *Answer) doubt(format string, args ...any) {
	a.Doubts = append(a.Doubts, fmt.Sprintf(format, args...))
}

// explainer makes one Answer.
type explainer struct {
	loop     *syncer.Loop
	env      Environment
	question Question
	answer   *Answer
	client   plan.TrafficSources // what Question.From is; plan.NoSource: not known yet
	// lacking are the families in which the Service lacks the port at its cluster IP.
	lacking []plan.Family
}

func (x *explainer) problem(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); !slices.Contains(x.answer.Problems, text) {
		x.answer.Problems = append(x.answer.Problems, text)
	}
}

// address answers a question about an address and a port.
func (x *explainer) address() {
	at := x.question.Address
	family := plan.FamilyOf(at.Addr())
	if !slices.Contains(x.loop.Families(), family) {
		x.answer.Sentence = fmt.Sprintf("signalbox does not serve %s on this node.", family)
		return
	}
	if from := x.question.From; at.Addr().IsLoopback() && from.IsValid() && !x.isNode(from) {
		x.answer.Sentence = fmt.Sprintf("%s is not an address of this node, and only processes of this node reach %s.", from, at.Addr())
		return
	}
	key := plan.FrontendKey{Addr: at.Addr(), Port: at.Port(), Protocol: x.question.Protocol}
	owner, found := x.loop.Owner(family, key)
	if !found && x.servesNodePorts(family, at.Addr()) {
		key.Addr = netip.Addr{}
		owner, found = x.loop.Owner(family, key)
	}
	if !found {
		x.answer.Sentence, x.answer.unserved = x.nobody(family, at)
		return
	}
	x.service(owner.ServiceName, key, []plan.Family{family})
	if len(x.answer.Ports) == 0 && x.answer.Sentence == "" { // the port of a health check is owned, too
		x.answer.Sentence = fmt.Sprintf("%s is the health check port of Service %s: signalbox itself answers there.", at, owner.ServiceName)
	}
}

// servesNodePorts says whether NodePorts are served at an address.
func (x *explainer) servesNodePorts(family plan.Family, a netip.Addr) bool {
	n := &x.loop.Plan(family).Node
	switch {
	case a.IsLoopback():
		everywhere := n.NodePortAddrs.All && x.env.Traits.Localhost == proxier.LocalhostByRoute
		return n.LocalhostNodePorts && (everywhere || a == plan.Localhost(family))
	case n.NodePortAddrs.All:
		return slices.Contains(x.loop.NodeAddrs(), a)
	}
	return slices.Contains(n.NodePortAddrs.Addrs, a)
}

// nobody answers for an address and port that no Service has. The verdict is empty if it is
// not known.
func (x *explainer) nobody(family plan.Family, at netip.AddrPort) (sentence string, verdict Verdict) {
	a := at.Addr()
	var others []string
	var kinds []plan.FrontendKind
	p := x.loop.Plan(family)
	for _, sp := range p.Services {
		for i := range sp.Frontends {
			if f := &sp.Frontends[i]; f.Addr == a {
				others, kinds = append(others, fmt.Sprintf("%s for port %d/%s", sp.Name, f.Port, sp.Name.Protocol)), append(kinds, f.Kind)
			}
		}
	}
	slices.Sort(others)
	var unserved []string
	otherProxy := false
	for _, s := range x.loop.UnservedAt(family, a) {
		unserved = append(unserved, fmt.Sprintf("Service %s has the address and is not served there: %s", s.Name, s.Text))
		otherProxy = otherProxy || s.Reason == plan.OtherProxy
	}
	inRange, clusterIP := plan.AnyContains(p.Node.ServiceCIDRs, a), slices.Contains(kinds, plan.ClusterIP)
	text := fmt.Sprintf("No Service that signalbox serves has %s/%s", at, x.question.Protocol)
	switch {
	case len(others) > 0:
		text += "; at this address there is " + list(others)
	case len(unserved) > 0:
	case inRange:
		text += "; the address is in the range of cluster IPs, and no Service that signalbox knows has it"
	case x.isNode(a) && !x.servesNodePorts(family, a):
		text += "; it is an address of this node at which NodePorts are not served (--nodeport-addresses)"
	}
	sentence = strings.Join(append([]string{text}, unserved[:min(len(unserved), maxListed)]...), "; ") + "."
	switch {
	case !inRange && !clusterIP || otherProxy || x.isNode(a):
	case !x.env.Traits.GuardsClusterIPs:
		sentence += " This mode has no rule for it: the node's routes decide."
	case !x.loop.Follows(family, a):
		sentence += " A sync is due, so it is not known what the kernel does."
	case x.question.Protocol == plan.TCP && x.sources(family)&plan.FromNode != 0 && slices.Contains(p.Node.Bypass, at):
		sentence += " An API server is there, and this node connects to it directly. Connections of Pods and other hosts are not let through."
	case clusterIP:
		verdict = Refused
		sentence += " A new connection is refused, because the Service does not have this port."
	case len(others) == 0:
		verdict = Dropped
		sentence += " A new connection is dropped: the client waits until its own timeout."
	}
	return sentence, verdict
}

// service answers for the ports of a Service that are asked for.
func (x *explainer) service(name plan.ServiceName, key plan.FrontendKey, families []plan.Family) {
	var reasons []service.Explanation
	for _, family := range families {
		s := x.loop.Service(family, name)
		for _, p := range s.Problems {
			x.problem("%s", p)
		}
		reasons = append(reasons, s.Explanation)
		if !x.question.includes(family) {
			continue
		}
		for _, sp := range s.Ports {
			x.port(family, &s, sp, key)
		}
	}
	if len(x.answer.Ports) == 0 && !x.question.Address.IsValid() && !x.lacksPort(families, reasons) {
		x.answer.Sentence = x.notServed(name, reasons)
	}
}

// lacksPort answers for each cluster IP if the question has the DNS name of a Service that
// lacks the port. It returns false if nothing is said.
func (x *explainer) lacksPort(families []plan.Family, reasons []service.Explanation) bool {
	if !x.question.ByDNS {
		return false
	}
	var sentences []string
	worst := Served
	number, _ := strconv.ParseUint(x.question.Port, 10, 16) // ParseQuestion has checked it
	for i, family := range families {
		ports := reasons[i].Ports
		if !x.question.includes(family) || len(ports) == 0 || len(ports[0].Frontends) == 0 {
			continue
		}
		at := netip.AddrPortFrom(ports[0].Frontends[0].Addr, uint16(number)) // the cluster IP is the first
		if _, found := x.loop.Owner(family, plan.FrontendKey{Addr: at.Addr(), Port: at.Port(), Protocol: x.question.Protocol}); found {
			return false // another Service has it, as an external IP
		}
		sentence, verdict := x.nobody(family, at)
		x.lacking, sentences = append(x.lacking, family), append(sentences, sentence)
		if verdict = cmp.Or(verdict, Unknown); badness[verdict] > badness[worst] {
			worst = verdict
		}
	}
	if len(sentences) == 0 {
		return false
	}
	x.answer.Sentence, x.answer.unserved = strings.Join(sentences, " "), worst
	return true
}

// notServed says why nothing of a Service is served, in any of the families or to the
// client.
func (x *explainer) notServed(name plan.ServiceName, families []service.Explanation) string {
	text := fmt.Sprintf("Service %s is not served: it has no cluster IP of an IP family that signalbox serves here.", name)
	for i, e := range families {
		switch {
		case e.NotServed == plan.NoService:
			return fmt.Sprintf("There is no Service %s, as far as signalbox knows: the API server does not tell it of headless Services, nor of those with the label %s.", name, service.LabelServiceProxyName)
		case e.NotServed == plan.TooLarge:
			return fmt.Sprintf("Service %s is not served: %s.", name, e.TooLarge)
		case e.NotServed == plan.NoAddressOfFamily:
		case e.NotServed != plan.NoReason:
			return fmt.Sprintf("Service %s is not served: %s.", name, e.NotServed.Text())
		case len(e.Ports) == 0:
			return fmt.Sprintf("Service %s has no port that can be served.", name)
		case !slices.ContainsFunc(e.Ports, x.question.names):
			return fmt.Sprintf("Service %s has no port %s; it has %s.", name, x.question.portText(), list(portTexts(e.Ports)))
		default:
			text = fmt.Sprintf("Service %s is served for %s, and the client's address %s is of the other IP family.", name, x.loop.Families()[i], x.question.From)
		}
	}
	return text
}

func (q *Question) portText() string {
	text := q.Port
	if q.Protocol != 0 {
		text += "/" + q.Protocol.String()
	}
	return text
}

func portTexts(ports []*plan.ServicePort) []string {
	var out []string
	for _, sp := range ports {
		text := fmt.Sprintf("%d/%s", portNumber(sp), sp.Name.Protocol)
		if sp.Name.Port != "" {
			text = sp.Name.Port + " " + text
		}
		out = append(out, text)
	}
	return out
}

// port adds the Port for a Service port, if it is asked for.
func (x *explainer) port(family plan.Family, s *syncer.ServiceState, sp *plan.ServicePort, key plan.FrontendKey) {
	why := s.Reasons[sp.Name]
	p := Port{
		name: sp.Name, Service: sp.Name.ServiceName.String(), Port: sp.Name.Port, Protocol: sp.Name.Protocol.String(), Family: family.String(),
		AffinitySeconds: int(sp.AffinityTimeout / time.Second), Hints: hintsOf(why), SlicesLeftOut: slicesOf(why),
	}
	if x.env.Live {
		p.Kernel = kernelOf(s, sp.Name)
	}
	sets := map[bool]*plan.EndpointSet{} // by policy: Local or not
	for i := range sp.Frontends {
		f := &sp.Frontends[i]
		if !x.question.asksFor(sp, f, key) {
			continue
		}
		for scope, from := range x.scopes(family, why, f) {
			c := connection{explainer: x, family: family, port: sp, frontend: f, from: from, scope: scope, why: why, state: s.States[sp.Name], problems: s.Problems}
			p.Connections = append(p.Connections, c.explain())
			sets[scope.Local] = c.set()
		}
		p.frontends = append(p.frontends, f.Key(sp.Name.Protocol))
	}
	if len(p.Connections) == 0 {
		return
	}
	for _, local := range []bool{false, true} {
		if set, asked := sets[local]; asked {
			p.Sets = append(p.Sets, setOf(why, local, set))
		}
	}
	x.answer.Ports = append(x.answer.Ports, p)
}

func policy(local bool) string {
	if local {
		return "Local"
	}
	return "Cluster"
}

func setOf(why *service.Reasons, local bool, chosen *plan.EndpointSet) Set {
	s := Set{Policy: policy(local), Endpoints: []Endpoint{}}
	for _, e := range why.Endpoints(service.Scope{Local: local}) {
		s.Endpoints = append(s.Endpoints, Endpoint{
			Address: e.Addr.String(), Node: e.Node, Target: e.Target,
			Used: chosen.Contains(e.Addr), Reason: e.Reason.String(), Text: e.Reason.Text(),
		})
	}
	return s
}

func hintsOf(why *service.Reasons) []Hint {
	var out []Hint
	for _, h := range why.Hints {
		if h.With > 0 {
			out = append(out, Hint{h.Kind, h.Here, h.Reason.String(), h.Reason.Text(), h.With, h.Without})
		}
	}
	return out
}

func slicesOf(why *service.Reasons) []SliceLeftOut {
	var out []SliceLeftOut
	for _, s := range why.Slices {
		out = append(out, SliceLeftOut{s.Slice, s.Reason.String(), s.Reason.Text(), s.Ports, s.Endpoints})
	}
	return out
}

func kernelOf(s *syncer.ServiceState, name plan.ServicePortName) *Kernel {
	state, differs := s.States[name]
	k := &Kernel{Current: !differs || !state.Pending, TookMillis: float64(s.Took.Microseconds()) / 1000, Problem: state.Problem}
	if !s.Written.IsZero() {
		k.Written = &s.Written
	}
	if state.Quarantined != nil {
		k.Quarantined, k.Since = state.Quarantined.Error(), &state.Since
	}
	return k
}

// scopes yields each scope that a frontend has, with the traffic sources that are
// asked about.
func (x *explainer) scopes(family plan.Family, why *service.Reasons, f *plan.Frontend) iter.Seq2[service.Scope, plan.TrafficSources] {
	inside, outside := x.sources(family)&^plan.FromOutside, x.sources(family)&plan.FromOutside
	return func(yield func(service.Scope, plan.TrafficSources) bool) {
		in, out := why.Scope(f.Kind, plan.FromPods), why.Scope(f.Kind, plan.FromOutside)
		if x.listens() {
			in = out
		}
		node := inside & plan.FromNode
		if client := x.question.From; client.IsValid() && x.isNode(client) {
			node = inside // also from an address among those of Pods
		}
		if node != plan.NoSource && x.bypasses(f) {
			if !yield(service.Scope{Reason: plan.APIServer}, node) {
				return
			}
			inside, node = inside&^node, plan.NoSource
		}
		if left := x.left(f, node, inside|outside); left != plan.NoSource {
			if !yield(service.Scope{Reason: plan.APIServerHost}, left) {
				return
			}
			inside, outside = inside&^left, outside&^left
		}
		switch {
		case inside|outside == 0:
		case in == out || outside == 0:
			yield(in, inside|outside)
		case inside == 0 || yield(in, inside):
			yield(out, outside)
		}
	}
}

// listens says whether the question is about loopback, and the mode listens at each
// NodePort there.
func (x *explainer) listens() bool {
	return x.question.Address.Addr().IsLoopback() && x.env.Traits.LocalhostListens
}

// bypasses says whether processes of this node that connect to a frontend come to an API
// server.
func (x *explainer) bypasses(f *plan.Frontend) bool {
	if a := x.question.Address; a.IsValid() {
		return slices.Contains(f.Bypass, a.Addr())
	}
	return len(f.Bypass) > 0
}

// left returns those of the traffic sources whose packets to a frontend the mode leaves
// alone, because another host with the address is an API server. node are the processes of
// this node.
func (x *explainer) left(f *plan.Frontend, node, all plan.TrafficSources) plan.TrafficSources {
	switch {
	case !x.env.Traits.LeavesAPIServers || !f.ForeignAddr || x.isNode(f.Addr):
		return plan.NoSource
	case f.Internal.Len() == 0:
		return all
	}
	return all &^ node
}

// sources are the traffic sources that are asked about. Where Pods cannot be told
// apart, they are clients from outside.
func (x *explainer) sources(family plan.Family) plan.TrafficSources {
	switch from := x.question.From; {
	case from.IsValid():
		if x.client == plan.NoSource {
			x.client = x.classify(family, from)
		}
		return x.client
	case x.question.Address.Addr().IsLoopback():
		return plan.FromNode
	case x.loop.Plan(family).Node.LocalPods.Known():
		return plan.AnySource
	}
	return plan.FromNode | plan.FromOutside
}

// classify says which traffic source an address is, as the rules tell it: they look for
// Pods first, so that a bridge's address among those of its Pods is a Pod's.
func (x *explainer) classify(family plan.Family, a netip.Addr) plan.TrafficSources {
	pods := &x.loop.Plan(family).Node.LocalPods
	byLink, link := len(pods.Prefixes) == 0 && pods.Known(), ""
	if byLink && x.env.Link != nil {
		link = x.env.Link(a)
	}
	switch {
	case plan.AnyContains(pods.Prefixes, a),
		pods.Interface != "" && link == pods.Interface,
		pods.InterfacePrefix != "" && strings.HasPrefix(link, pods.InterfacePrefix):
		return plan.FromPods
	case x.isNode(a):
		return plan.FromNode
	}
	if byLink && x.env.Link == nil {
		x.problem("Pods of this node are known by their interface: ask on the node whether %s is one; here it counts as a client outside of the node", a)
	}
	return plan.FromOutside
}

// isNode says whether an address is one of this node.
func (x *explainer) isNode(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(x.loop.NodeAddrs(), a)
}
