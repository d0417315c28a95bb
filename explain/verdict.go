// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// connection is a new connection to a frontend.
type connection struct {
	*explainer
	family   plan.Family
	port     *plan.ServicePort
	frontend *plan.Frontend
	from     plan.TrafficSources
	scope    service.Scope
	why      *service.Reasons
	state    syncer.PortState
	problems []plan.Problem // of the Service and its slices
}

// set has the endpoints for the connection.
func (c *connection) set() *plan.EndpointSet {
	if c.from&plan.FromOutside != 0 || c.listens() {
		return c.frontend.External
	}
	return c.frontend.Internal
}

func (c *connection) explain() Connection {
	verdict, sentence := c.verdict()
	endpoints, masqueraded := c.set().Len(), c.masqueraded()
	if c.scope.Reason == plan.APIServer || c.scope.Reason == plan.APIServerHost || verdict == Refused {
		endpoints, masqueraded = 0, plan.NoSource
	}
	return Connection{
		Kind: c.frontend.Kind.String(), Address: c.frontend.Key(c.port.Name.Protocol).String(),
		From: sourceNames(c.from), Policy: policy(c.scope.Local), Reason: c.scope.Reason.String(), Text: c.scope.Reason.Text(),
		SourceRanges: prefixTexts(c.frontend.Sources), Masquerade: sourceNames(masqueraded),
		Endpoints: endpoints, Verdict: verdict, Sentence: sentence,
	}
}

func sourceNames(s plan.TrafficSources) []string {
	if s == plan.NoSource {
		return []string{}
	}
	return strings.Fields(s.String())
}

// masqueraded returns the traffic sources whose source address may be rewritten.
func (c *connection) masqueraded() plan.TrafficSources {
	node, client := &c.loop.Plan(c.family).Node, c.question.From
	if client.IsValid() && slices.ContainsFunc(c.set().Endpoints, func(e plan.Endpoint) bool { return node.BetweenNodes(client, e.Addr()) }) {
		return c.from
	}
	return c.from & c.frontend.Masquerade
}

// verdict says what becomes of the connection.
func (c *connection) verdict() (Verdict, string) {
	key := c.frontend.Key(c.port.Name.Protocol)
	owner, _ := c.loop.Owner(c.family, key)
	sources, client := c.frontend.Sources, c.question.From
	switch {
	case owner != c.port.Name:
		return Unknown, fmt.Sprintf("%s is not served for Service %s: Service %s has it.", key, c.port.Name, owner)
	case c.state.Quarantined != nil:
		return Unknown, fmt.Sprintf("The kernel has refused the rules of Service %s since %s: %v. The kernel keeps the earlier rules.",
			c.port.Name, c.state.Since.Format(time.RFC3339), c.state.Quarantined)
	case c.state.Pending:
		return Unknown, c.pending()
	case c.scope.Reason == plan.APIServer:
		return Unknown, fmt.Sprintf("%s does not go to the Service: an API server is at %s, and this node connects to it directly.",
			c.subject(), netip.AddrPortFrom(c.frontend.Bypass[0], c.frontend.Port))
	case c.scope.Reason == plan.APIServerHost:
		return Unknown, fmt.Sprintf("%s does not go to the Service: an API server has the address %s, and mode %s leaves packets to it alone.",
			c.subject(), c.frontend.Addr, c.env.Mode)
	case sources != nil && (len(sources) == 0 || client.IsValid() && !plan.AnyContains(sources, client)):
		return Dropped, c.subject() + " is dropped: " + admitted(sources)
	case slices.Contains(c.env.Traits.Refused, key.Protocol):
		return Refused, fmt.Sprintf("%s is refused: mode %s does not serve %s.", c.subject(), c.env.Mode, strings.ToUpper(key.Protocol.String()))
	case c.listens() && key.Protocol != plan.TCP:
		return Refused, fmt.Sprintf("%s is refused: on loopback, mode %s serves TCP alone.", c.subject(), c.env.Mode)
	case c.listens() && c.state.Problem != "":
		return Unknown, fmt.Sprintf("%s does not go to the Service: %s.", c.subject(), c.state.Problem)
	case c.set().Len() > 0:
		return Served, c.subject() + " " + c.goes() + c.restriction()
	}
	return c.empty()
}

// empty says what becomes of a connection for which there is no endpoint.
func (c *connection) empty() (Verdict, string) {
	switch {
	case c.frontend.WhenEmpty != plan.Drop:
		return Refused, c.subject() + " is refused: " + c.nowhere()
	case c.listens(): // nobody listens then
		return Refused, c.subject() + " is refused: a connection on loopback counts as from outside. There " + c.elsewhere()
	}
	return Dropped, c.subject() + " is dropped: " + c.elsewhere()
}

// elsewhere says that the policy forbids endpoints of other nodes.
func (c *connection) elsewhere() string {
	return fmt.Sprintf("%s, and no usable endpoint is on this node%s.", c.scope.Reason.Text(), c.leftOut(c.scope))
}

// pending says why the kernel may not have the planned form of the Service port.
func (c *connection) pending() string {
	text := fmt.Sprintf("The kernel is not known to have this form of Service %s", c.port.Name)
	state := c.loop.State(c.family)
	if state.Failure == nil {
		return text + ": a sync is due."
	}
	return fmt.Sprintf("%s: each sync of %s has failed since %s: %v.", text, c.family, state.FailingSince.Format(time.RFC3339), state.Failure)
}

// subject is for example "A new TCP connection from Pod 10.244.1.12".
func (c *connection) subject() string {
	what := map[plan.Protocol]string{plan.TCP: "TCP connection", plan.UDP: "UDP flow", plan.SCTP: "SCTP association"}[c.port.Name.Protocol]
	text := "A new " + what + " from " + c.who()
	if !c.question.Address.IsValid() {
		text += " to " + c.frontend.Key(c.port.Name.Protocol).String()
	}
	return text
}

// who names the client.
func (c *connection) who() string {
	if a := c.question.From; a.IsValid() {
		switch {
		case c.isNode(a):
			return "this node's " + a.String()
		case c.explainer.client == plan.FromPods:
			return "Pod " + a.String()
		}
		return a.String()
	}
	if c.from == c.sources(c.family) && !c.question.Address.Addr().IsLoopback() {
		return "any client"
	}
	var clients []string
	for _, name := range sourceNames(c.from) {
		clients = append(clients, map[string]string{"pods": "a Pod of this node", "node": "a process of this node", "outside": "a client outside of this node"}[name])
	}
	return strings.Join(clients, " or ")
}

// goes says where a connection goes that has endpoints.
func (c *connection) goes() string {
	text := fmt.Sprintf("goes to one of %d endpoints", c.set().Len())
	if c.set().Len() == 1 {
		text = "goes to the endpoint " + c.set().Endpoints[0].String()
	}
	if c.port.AffinityTimeout > 0 && c.set().Len() > 1 {
		text += fmt.Sprintf(", the one that the client had in the last %v", c.port.AffinityTimeout)
	}
	return text + "."
}

// restriction follows if only some clients are admitted and no client is named.
func (c *connection) restriction() string {
	if c.frontend.Sources == nil || c.question.From.IsValid() {
		return ""
	}
	return " Other clients than those of the source ranges are dropped: " + admitted(c.frontend.Sources)
}

func admitted(sources []netip.Prefix) string {
	if len(sources) == 0 {
		return "no source range of the Service is valid, so it admits nobody."
	}
	return "loadBalancerSourceRanges admits " + list(prefixTexts(sources)) + "."
}

// nowhere says why there is no endpoint at all, on any node.
func (c *connection) nowhere() string {
	var wrongPort, otherFamily []string
	for _, s := range c.why.Slices {
		if s.Reason == plan.NoSuchPort {
			wrongPort = append(wrongPort, fmt.Sprintf("%s has %s", s.Slice, list(s.Ports)))
		} else {
			otherFamily = append(otherFamily, s.Slice)
		}
	}
	switch {
	case len(c.why.Cluster) > 0:
		return "the Service has no ready endpoint" + c.leftOut(service.Scope{}) + "."
	case len(wrongPort) > 0:
		return fmt.Sprintf("no EndpointSlice has the port %q with %s; %s.", c.port.Name.Port, c.port.Name.Protocol, list(wrongPort))
	case len(otherFamily) > 0:
		return fmt.Sprintf("the Service has no %s endpoint; %s is of the other IP family.", c.family, list(otherFamily))
	case slices.ContainsFunc(c.problems, func(p plan.Problem) bool { return p.Kind == "EndpointSlice" }):
		return "no endpoint of the Service can be served, as the problems say."
	}
	return "the Service has no endpoint: its selector matches no Pod, or nobody made an EndpointSlice for it."
}

// leftOut counts the endpoints by the reason for which a scope leaves them out.
func (c *connection) leftOut(scope service.Scope) string {
	counts := map[plan.Reason]int{}
	var order []plan.Reason
	for _, e := range c.why.Endpoints(scope) {
		if counts[e.Reason]++; counts[e.Reason] == 1 {
			order = append(order, e.Reason)
		}
	}
	var parts []string
	for _, r := range order {
		verb := "are"
		if counts[r] == 1 {
			verb = "is"
		}
		parts = append(parts, fmt.Sprintf("%d %s %s", counts[r], verb, r.Text()))
	}
	if len(parts) == 0 {
		return ""
	}
	return "; " + strings.Join(parts, ", ")
}

// maxListed is how many things a sentence lists.
const maxListed = 5

func list(texts []string) string {
	if len(texts) == 0 {
		return "none"
	}
	if more := len(texts) - maxListed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(texts[:maxListed], ", "), more)
	}
	return strings.Join(texts, ", ")
}

// prefixTexts returns nil for nil.
func prefixTexts(prefixes []netip.Prefix) []string {
	if prefixes == nil {
		return nil
	}
	texts := make([]string, len(prefixes))
	for i, p := range prefixes {
		texts[i] = p.String()
	}
	return texts
}
