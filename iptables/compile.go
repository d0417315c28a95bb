// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"maps"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// serviceRules is all that one ServicePort puts into the kernel.
type serviceRules struct {
	port    *plan.ServicePort // nil in noRules
	chains  [tableCount][]chain
	entries []*entry
	digests [tableCount]digest
}

// entry is the part that one ServicePort has in a dispatch tree: the rules for
// one key.
type entry struct {
	entryID
	owner plan.ServicePortName
	rules []string
}

type entryID struct {
	tree treeID
	key  plan.FrontendKey
}

// compiled is what a change of the plan asks for.
type compiled struct {
	services map[plan.ServicePortName]*serviceRules // noRules: remove
	node     *nodeRules                             // nil: the same
}

// nodeRules is what depends on the node and on no Service.
type nodeRules struct {
	node   plan.Node
	static [tableCount][]chain
	roots  [treeCount]rootRules
}

// noRules are those of a Service port that is not there.
var noRules = &serviceRules{}

// everything is the change that makes a whole plan of an empty one.
func everything(p *plan.Plan) plan.Change {
	return plan.Change{Node: true, Services: slices.Collect(maps.Keys(p.Services))}
}

// compiler turns a plan into rules, for a node whose local Pods stay the same.
type compiler struct {
	family      plan.Family
	packetMark  uint32
	pods        []podMatch
	dropInvalid bool // see staticChains
	resetStrays bool // see plan.Node
}

func newCompiler(opts proxier.Options, node *plan.Node, dropInvalid bool) (*compiler, error) {
	matches, err := podMatches(node.LocalPods)
	if opts.MasqueradeMark == 0 {
		opts.MasqueradeMark = proxier.DefaultMasqueradeMark
	}
	return &compiler{opts.Family, opts.MasqueradeMark, matches, dropInvalid, node.ResetStrays}, err
}

// compile compiles what the change names.
func (c *compiler) compile(desired *plan.Plan, change plan.Change) compiled {
	out := compiled{services: make(map[plan.ServicePortName]*serviceRules, len(change.Services))}
	for _, name := range change.Services {
		out.services[name] = noRules
		if sp := desired.Services[name]; sp != nil {
			out.services[name] = c.servicePort(sp)
		}
	}
	if change.Node {
		node := cloneNode(desired.Node)
		out.node = &nodeRules{node, c.staticChains(&node), rootRulesOf(c.family, &node)}
	}
	return out
}

func cloneNode(n plan.Node) plan.Node {
	n.LocalPods.Prefixes = slices.Clone(n.LocalPods.Prefixes)
	n.OwnPods = slices.Clone(n.OwnPods)
	n.NodePortAddrs.Addrs = slices.Clone(n.NodePortAddrs.Addrs)
	n.RouteSources = slices.Clone(n.RouteSources)
	n.Bypass = slices.Clone(n.Bypass)
	n.ServiceCIDRs = nil // no rule depends on them
	return n
}

// needsFull says whether the rules of nearly every Service depend on what
// changed of the node.
func needsFull(old, next *plan.Node) bool {
	a, b := &old.LocalPods, &next.LocalPods
	return !slices.Equal(a.Prefixes, b.Prefixes) || a.Interface != b.Interface || a.InterfacePrefix != b.InterfacePrefix ||
		!slices.Equal(old.OwnPods, next.OwnPods) || old.ResetStrays != next.ResetStrays
}

// maxRun is the number of endpoints up to which a chain holds them one after
// the other. Larger sets are spread over about the square root of their number
// of chains, so that a new connection passes two short runs.
const maxRun = 128

func (c *compiler) servicePort(sp *plan.ServicePort) *serviceRules {
	b := builder{
		compiler: c, serviceRules: &serviceRules{port: sp}, sp: sp, name: sp.Name.String(), proto: sp.Name.Protocol.String(), owners: []string{sp.Name.String()},
		dispatchers: map[dispatcher]string{}, endpoints: map[netip.AddrPort]bool{}, hairpins: map[netip.Addr]bool{},
	}
	b.nameSets()
	for i := range sp.Frontends {
		b.frontend(&sp.Frontends[i])
	}
	b.chains[filter] = append(b.chains[filter], b.partlyEmpty...)
	for _, s := range b.sets {
		b.endpointSet(s)
	}
	if port := sp.HealthCheckNodePort; port != 0 {
		b.addEntry(healthTree, plan.FrontendKey{Port: port, Protocol: plan.TCP},
			" -p tcp -m tcp --dport "+strconv.Itoa(int(port))+comment(b.name+" health check node port")+" -j ACCEPT")
	}
	b.digests = b.serviceRules.digest()
	return b.serviceRules
}

// builder compiles one ServicePort.
type builder struct {
	*compiler
	*serviceRules
	sp          *plan.ServicePort
	name, proto string
	owners      []string // name alone
	sets        []*setChain
	dispatchers map[dispatcher]string // -> chain name
	// sourceRangeChains counts the names given to chains of source ranges.
	sourceRangeChains int
	// partlyEmpty are the filter chains for frontends without endpoints for some
	// traffic sources.
	partlyEmpty []chain
	endpoints   map[netip.AddrPort]bool // have chains of their own
	hairpins    map[netip.Addr]bool     // have an entry
}

// setChain is the chain that picks one endpoint of a set.
type setChain struct {
	set  *plan.EndpointSet
	name string
	// masquerade are the first rules of the chain: they mark traffic to cluster IPs.
	masquerade []string
}

// dispatcher is a chain that chooses a set by traffic source.
type dispatcher struct {
	internal, external *setChain
	masquerade         plan.TrafficSources
}

func (b *builder) chainName(prefix string, ordinal int) string {
	return prefix + portHash(b.sp.Name, ordinal)
}

func (b *builder) addChain(t table, level uint8, name string, rules []string) {
	b.chains[t] = append(b.chains[t], chain{Name: name, Level: level, Owners: b.owners, Rules: rules})
}

func (b *builder) addEntry(tree treeID, key plan.FrontendKey, rules ...string) {
	b.entries = append(b.entries, &entry{entryID{tree, key}, b.sp.Name, rules})
}

// nameSets gives a chain to each endpoint set that is not empty. The sets for
// outside traffic alone have the prefix of local sets, all others that of
// cluster-wide sets.
func (b *builder) nameSets() {
	ordinals := map[string]int{}
	add := func(s *plan.EndpointSet, prefix string) {
		if s.Len() > 0 && b.set(s) == nil {
			b.sets = append(b.sets, &setChain{set: s, name: b.chainName(prefix, ordinals[prefix])})
			ordinals[prefix]++
		}
	}
	for _, f := range b.sp.Frontends {
		if f.Internal != f.External {
			add(f.External, localPrefix)
		}
	}
	for _, f := range b.sp.Frontends {
		add(f.Internal, clusterPrefix)
		add(f.External, clusterPrefix)
	}
}

// set returns the set's chain, or nil for an empty set.
func (b *builder) set(s *plan.EndpointSet) *setChain {
	i := slices.IndexFunc(b.sets, func(c *setChain) bool { return c.set == s })
	if i < 0 {
		return nil
	}
	return b.sets[i]
}

// frontend adds what both tables do with connections to a frontend.
func (b *builder) frontend(f *plan.Frontend) {
	key, match := f.Key(b.sp.Name.Protocol), " -p "+b.proto+" -m "+b.proto+" --dport "+strconv.Itoa(int(f.Port))
	tree := servicesTree
	if f.Kind == plan.NodePort {
		key.Addr, tree = netip.Addr{}, nodePortsTree
	} else {
		match = destination(f.Addr) + match
	}
	ranges := ""
	if f.Sources != nil {
		ranges = b.chainName(sourcesPrefix, b.sourceRangeChains)
		b.sourceRangeChains++
	}
	if target := b.dispatch(f, match); target != "" {
		if f.Sources != nil {
			target = b.allowSources(f, ranges, target)
		}
		b.addEntry(tree, key, match+comment(b.name+" "+f.Kind.String())+" -j "+target)
	}
	b.refuse(f, key, match, ranges)
}

// dispatch returns the chain that takes the frontend's connections, or "" if
// both sets are empty.
func (b *builder) dispatch(f *plan.Frontend, match string) string {
	d := dispatcher{b.set(f.Internal), b.set(f.External), f.Masquerade}
	if d.internal == d.external {
		switch {
		case d.internal == nil:
			return ""
		case f.Kind == plan.ClusterIP:
			// Nearly every Service has only this: it costs no chain of its own.
			d.internal.masquerade = append(d.internal.masquerade, masquerade(b.pods, f.Masquerade, match)...)
			return d.internal.name
		case f.Masquerade == plan.NoSource:
			return d.internal.name
		}
	}
	name, exists := b.dispatchers[d]
	if !exists {
		name = b.chainName(externalPrefix, len(b.dispatchers))
		b.dispatchers[d] = name
		b.addChain(nat, dispatcherLevel, name, b.dispatcherRules(d))
	}
	return name
}

func (b *builder) dispatcherRules(d dispatcher) []string {
	if d.internal == d.external {
		return append(masquerade(b.pods, d.masquerade, ""), " -j "+d.internal.name)
	}
	var rules []string
	add := func(match string, source plan.TrafficSources, set *setChain) {
		if set == nil {
			rules = append(rules, match+" -j RETURN")
			return
		}
		if d.masquerade&source != 0 {
			rules = append(rules, match+" -j "+markMasqChain)
		}
		rules = append(rules, match+" -j "+set.name)
	}
	for _, p := range b.pods {
		add(p.is, plan.FromPods, d.internal)
	}
	add(fromNode, plan.FromNode, d.internal)
	if d.external != nil {
		add("", plan.FromOutside, d.external)
	}
	return rules
}

// endpointSet adds the chain that picks an endpoint: the one that the client
// had before, or any with equal probability.
func (b *builder) endpointSet(s *setChain) {
	endpoints := s.set.Endpoints
	rules := slices.Grow(s.masquerade, len(endpoints))
	if b.sp.AffinityTimeout > 0 {
		// Rounded up: an affinity lasts at least as long as asked for, and the
		// kernel takes no zero.
		seconds := int(math.Ceil(b.sp.AffinityTimeout.Seconds()))
		for _, e := range endpoints {
			name := endpointChain(b.sp.Name, e)
			rules = append(rules, " -m recent --name "+name+" --rcheck --seconds "+strconv.Itoa(seconds)+" --reap --rsource -j "+name)
		}
	}
	if len(endpoints) <= maxRun {
		b.addChain(nat, setLevel, s.name, b.pick(rules, endpoints))
		return
	}
	left := len(endpoints)
	for i, bucket := range spread(endpoints) {
		if len(bucket) == 0 {
			continue
		}
		name := bucketChain(s.name, i)
		rules = append(rules, chance(len(bucket), left)+" -j "+name)
		left -= len(bucket)
		b.addChain(nat, bucketLevel, name, b.pick(nil, bucket))
	}
	b.addChain(nat, setLevel, s.name, rules)
}

// spread divides endpoints by a hash of each, so that one more or one less
// changes one bucket only.
func spread(endpoints []plan.Endpoint) [][]plan.Endpoint {
	buckets := make([][]plan.Endpoint, 1<<bits.Len(uint(math.Sqrt(float64(len(endpoints))))))
	for _, e := range endpoints {
		h := uint32(2166136261) // FNV-1a
		addr := e.Addr().As16()
		for _, x := range append(addr[:], byte(e.Port()>>8), byte(e.Port())) {
			h = (h ^ uint32(x)) * 16777619
		}
		i := int(h^h>>16) & (len(buckets) - 1)
		buckets[i] = append(buckets[i], e)
	}
	return buckets
}

// pick appends to rules one for each endpoint.
func (b *builder) pick(rules []string, endpoints []plan.Endpoint) []string {
	for i, e := range endpoints {
		match := chance(1, len(endpoints)-i)
		if e.MayHairpin {
			b.hairpin(e.Addr())
		}
		if b.sp.AffinityTimeout > 0 {
			rules = append(rules, match+" -j "+b.endpoint(e))
			continue
		}
		rules = append(rules, " -p "+b.proto+match+dnat(e))
	}
	return rules
}

// hairpin masquerades connections of an endpoint to itself, which would take
// the answers for its own. The check comes after the choice of the endpoint:
// before it, each endpoint of each Service port would need a chain.
func (b *builder) hairpin(a netip.Addr) {
	if !b.hairpins[a] {
		b.hairpins[a] = true
		rule := source(a) + destination(a) + " -j " + markMasqChain
		b.entries = append(b.entries, &entry{entryID: entryID{hairpinTree, plan.FrontendKey{Addr: a}}, rules: []string{rule}})
	}
}

func dnat(e plan.Endpoint) string { return " -j DNAT --to-destination " + e.AddrPort.String() }

func destination(a netip.Addr) string { return " -d " + netip.PrefixFrom(a, a.BitLen()).String() }

func source(a netip.Addr) string { return " -s " + netip.PrefixFrom(a, a.BitLen()).String() }

// chance matches n of total packets; all if n is total.
func chance(n, total int) string {
	if n >= total {
		return ""
	}
	return " -m statistic --mode random --probability " + strconv.FormatFloat(float64(n)/float64(total), 'f', 10, 64)
}

// endpoint returns the endpoint's own chain, which remembers the client. The
// Service port's sets share it: a client keeps its endpoint whichever frontend
// it uses.
func (b *builder) endpoint(e plan.Endpoint) string {
	name := endpointChain(b.sp.Name, e)
	if !b.endpoints[e.AddrPort] {
		b.endpoints[e.AddrPort] = true
		b.addChain(nat, endpointLevel, name, []string{" -p " + b.proto + " -m recent --name " + name + " --set --rsource" + dnat(e)})
	}
	return name
}
