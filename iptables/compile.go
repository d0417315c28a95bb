package iptables

import (
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"

	"signalbox/proxier/plan"
)

// chain is one chain and its rules. A rule is the text after "-A CHAIN", with
// the blank that follows it.
type chain struct {
	name  string
	level level
	rules []string
}

// level orders chains: rules jump only to chains of lower levels.
type level int

const (
	frameLevel level = iota // what every other may jump to
	endpointLevel
	bucketLevel
	setLevel
	entryLevel
	sourcesLevel
	treeLevel              // the deepest leaf; see tree.level
	trunkLevel level = 254 // leads to a tree
	goneLevel  level = 255
)

// item is the part that one ServicePort has in a dispatch tree: the rules for
// one key.
type item struct {
	tree  treeID
	key   plan.FrontendKey
	owner plan.ServicePortName
	rules []string
}

// program is all that one ServicePort puts into the kernel.
type program struct {
	chains [tableCount][]chain
	items  []item
}

// compiler turns ServicePorts into programs for one node.
type compiler struct {
	family plan.Family
	pods   []podMatch
}

// maxRun is the number of endpoints up to which a chain holds them one after
// the other. Larger sets are spread over about the square root of their number
// of chains, so that a new connection passes two short runs.
const maxRun = 128

func (c *compiler) compile(sp *plan.ServicePort) program {
	b := builder{compiler: c, sp: sp, name: sp.Name.String(), proto: sp.Name.Protocol.String()}
	b.nameSets()
	for i := range sp.Frontends {
		b.frontend(&sp.Frontends[i])
	}
	b.chains[filter] = append(b.chains[filter], b.splits...)
	for i := range b.sets {
		b.endpointSet(&b.sets[i])
	}
	if port := sp.HealthCheckNodePort; port != 0 {
		b.add(healthTree, plan.FrontendKey{Port: port, Protocol: plan.TCP},
			" -p tcp -m tcp --dport "+strconv.Itoa(int(port))+comment(b.name+" health check node port")+" -j ACCEPT")
	}
	return b.program
}

// builder compiles one ServicePort.
type builder struct {
	*compiler
	program
	sp          *plan.ServicePort
	name, proto string
	firstHash   string // portHash of ordinal 0, which most chains use
	sets        []setChain
	entries     []entryChain
	// splits are the filter chains that tell origins apart.
	splits    []chain
	endpoints map[netip.AddrPort]struct{} // that have chains of their own
	hairpins  map[netip.Addr]struct{}     // that have an item
}

// setChain is the chain that picks one endpoint of a set.
type setChain struct {
	set  *plan.EndpointSet
	name string
	// heads are rules that come first: masquerade of cluster IPs.
	heads []string
}

// entryChain tells origins apart before a set is chosen.
type entryChain struct {
	internal, external string
	masquerade         plan.TrafficSources
	name               string
}

func (b *builder) chainName(prefix string, ordinal int) string {
	if ordinal > 0 {
		return prefix + portHash(b.sp.Name, ordinal)
	}
	if b.firstHash == "" {
		b.firstHash = portHash(b.sp.Name, 0)
	}
	return prefix + b.firstHash
}

// nameSets gives a chain to each endpoint set that is not empty. A set that is
// external to some frontend and internal to the same one is not told apart has
// the prefix of cluster-wide sets, others that of local ones.
func (b *builder) nameSets() {
	ordinals := map[string]int{}
	add := func(s *plan.EndpointSet, prefix string) {
		if s.Len() > 0 && b.setName(s) == "" {
			b.sets = append(b.sets, setChain{set: s, name: b.chainName(prefix, ordinals[prefix])})
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

// setName is the set's chain, or "" for an empty set.
func (b *builder) setName(s *plan.EndpointSet) string {
	for i := range b.sets {
		if b.sets[i].set == s {
			return b.sets[i].name
		}
	}
	return ""
}

func (b *builder) add(tree treeID, key plan.FrontendKey, rules ...string) {
	b.items = append(b.items, item{tree, key, b.sp.Name, rules})
}

// match is what a packet to the frontend looks like.
func (b *builder) match(f *plan.Frontend) string {
	s := " -p " + b.proto + " -m " + b.proto + " --dport " + strconv.Itoa(int(f.Port))
	if f.Kind == plan.NodePort {
		return s
	}
	return destination(f.Addr) + s
}

func destination(a netip.Addr) string {
	return " -d " + netip.PrefixFrom(a, a.BitLen()).String()
}

func source(a netip.Addr) string { return " -s " + netip.PrefixFrom(a, a.BitLen()).String() }

func (b *builder) frontend(f *plan.Frontend) {
	internal, external := b.setName(f.Internal), b.setName(f.External)
	key, match := f.Key(b.sp.Name.Protocol), b.match(f)
	if f.Kind == plan.NodePort {
		key.Addr = netip.Addr{}
	}
	label := comment(b.name + " " + f.Kind.String())
	var firewall string
	if f.Sources != nil {
		firewall = b.chainName(sourcesPrefix, b.ordinal(f))
	}
	if target := b.entry(f, internal, external, match); target != "" {
		if f.Sources != nil {
			target = b.admit(f, firewall, target)
		}
		b.add(addressOrPort(f, servicesTree, nodePortsTree), key, match+label+" -j "+target)
	}
	b.refuse(f, key, match, firewall)
}

// ordinal numbers the frontends that need chains of their own.
func (b *builder) ordinal(f *plan.Frontend) int {
	n := 0
	for i := range b.sp.Frontends {
		if &b.sp.Frontends[i] == f {
			break
		}
		if b.sp.Frontends[i].Sources != nil {
			n++
		}
	}
	return n
}

func addressOrPort(f *plan.Frontend, address, port treeID) treeID {
	if f.Kind == plan.NodePort {
		return port
	}
	return address
}

// entry returns the chain that takes the frontend's connections, or "" where
// both sets are empty.
func (b *builder) entry(f *plan.Frontend, internal, external, match string) string {
	switch {
	case internal == external && (internal == "" || f.Masquerade == plan.NoSource):
		return internal
	case internal == external && f.Kind == plan.ClusterIP:
		// No other chain to jump through for what nearly every Service has.
		for i := range b.sets {
			if b.sets[i].name == internal {
				b.sets[i].heads = append(b.sets[i].heads, masquerade(b.pods, f.Masquerade, match)...)
			}
		}
		return internal
	}
	for _, e := range b.entries {
		if e.internal == internal && e.external == external && e.masquerade == f.Masquerade {
			return e.name
		}
	}
	e := entryChain{internal, external, f.Masquerade, b.chainName(externalPrefix, len(b.entries))}
	b.entries = append(b.entries, e)
	b.chains[nat] = append(b.chains[nat], chain{e.name, entryLevel, b.entryRules(e)})
	return e.name
}

func (b *builder) entryRules(e entryChain) []string {
	if e.internal == e.external {
		return append(masquerade(b.pods, e.masquerade, ""), " -j "+e.internal)
	}
	var rules []string
	add := func(match string, origin plan.TrafficSources, target string) {
		if e.masquerade&origin != 0 && target != "" {
			rules = append(rules, match+" -j "+markMasqChain)
		}
		if target == "" {
			target = "RETURN"
		}
		rules = append(rules, match+" -j "+target)
	}
	for _, p := range b.pods {
		add(p.is, plan.FromPods, e.internal)
	}
	add(fromNode, plan.FromNode, e.internal)
	if e.external != "" {
		add("", plan.FromOutside, e.external)
	}
	return rules
}

// admit lets only the frontend's sources through to target.
func (b *builder) admit(f *plan.Frontend, name, target string) string {
	b.chains[nat] = append(b.chains[nat], chain{name, sourcesLevel, eachSource(f, target)})
	return name
}

func eachSource(f *plan.Frontend, target string) []string {
	rules := make([]string, 0, len(f.Sources)+1)
	for _, p := range f.Sources {
		rules = append(rules, " -s "+p.Masked().String()+" -j "+target)
	}
	return rules
}

// refuse adds what the filter table does with a connection that the nat table
// did not send to an endpoint: it still has the frontend's address there.
func (b *builder) refuse(f *plan.Frontend, key plan.FrontendKey, match, firewall string) {
	var rules []string
	if f.Sources != nil {
		b.chains[filter] = append(b.chains[filter], chain{firewall, sourcesLevel, append(eachSource(f, "RETURN"), " -j DROP")})
		rule := match + comment(b.name+" source ranges") + " -j " + firewall
		if f.Kind == plan.NodePort {
			rules = append(rules, rule)
		} else {
			b.add(firewallTree, key, rule)
		}
	}
	if f.Internal.Len() == 0 || f.External.Len() == 0 {
		rules = append(rules, b.verdict(f, match))
	}
	if len(rules) == 0 {
		return
	}
	tree := addressOrPort(f, externalTree, externalPortsTree)
	if f.Kind == plan.ClusterIP {
		tree = emptyTree
	}
	b.add(tree, key, rules...)
}

// verdict is the rule for a frontend without endpoints. Where only some
// origins find none, the others may still pass with this destination: an
// endpoint can be the node itself at the same port.
func (b *builder) verdict(f *plan.Frontend, match string) string {
	verdict, why := " -j REJECT", " has no endpoints"
	if f.WhenEmpty == plan.Drop {
		verdict, why = " -j DROP", " has no local endpoints"
	}
	internalEmpty, externalEmpty := f.Internal.Len() == 0, f.External.Len() == 0
	if internalEmpty && externalEmpty {
		return match + comment(b.name+why) + verdict
	}
	target := verdict
	if externalEmpty {
		target = " -j RETURN"
	}
	var rules []string
	for _, p := range b.pods {
		rules = append(rules, p.is+target)
	}
	rules = append(rules, fromNode+target)
	if externalEmpty {
		rules = append(rules, verdict)
	}
	// What is in a chain of this name never changes: see transition.
	shape := 0
	if internalEmpty {
		shape += 2
	}
	if f.WhenEmpty == plan.Reject {
		shape++
	}
	name := b.chainName(externalPrefix, shape)
	if !slices.ContainsFunc(b.splits, func(c chain) bool { return c.name == name }) {
		b.splits = append(b.splits, chain{name, entryLevel, rules})
	}
	return match + comment(b.name+why) + " -j " + name
}

// endpointSet writes the chain that picks an endpoint: the one that the client
// had before, or any with equal probability.
func (b *builder) endpointSet(s *setChain) {
	endpoints := s.set.Endpoints
	rules := slices.Grow(s.heads, len(endpoints))
	if b.sp.AffinityTimeout > 0 {
		check := " --rcheck --seconds " + strconv.Itoa(b.affinitySeconds()) + " --reap"
		for _, e := range endpoints {
			name := endpointChain(b.sp.Name, e)
			rules = append(rules, " -m recent --name "+name+check+" --rsource -j "+name)
		}
	}
	if len(endpoints) <= maxRun {
		b.chains[nat] = append(b.chains[nat], chain{s.name, setLevel, b.pick(rules, endpoints)})
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
		b.chains[nat] = append(b.chains[nat], chain{name, bucketLevel, b.pick(nil, bucket)})
	}
	b.chains[nat] = append(b.chains[nat], chain{s.name, setLevel, rules})
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

// hairpin has the source of connections of an endpoint to itself rewritten: it
// would take the answers for its own. To tell them before an endpoint is chosen
// would take a chain for each endpoint of each Service port.
func (b *builder) hairpin(a netip.Addr) {
	if _, done := b.hairpins[a]; done {
		return
	}
	if b.hairpins == nil {
		b.hairpins = map[netip.Addr]struct{}{}
	}
	b.hairpins[a] = struct{}{}
	rule := source(a) + destination(a) + " -j " + markMasqChain
	b.items = append(b.items, item{tree: hairpinTree, key: plan.FrontendKey{Addr: a}, rules: []string{rule}})
}

func dnat(e plan.Endpoint) string { return " -j DNAT --to-destination " + e.AddrPort.String() }

// chance matches n of total packets; all where n is total.
func chance(n, total int) string {
	if n >= total {
		return ""
	}
	return " -m statistic --mode random --probability " + strconv.FormatFloat(float64(n)/float64(total), 'f', 10, 64)
}

// endpoint returns the endpoint's own chain, which remembers the client. Its
// sets share it: a client keeps its endpoint whichever frontend it uses.
func (b *builder) endpoint(e plan.Endpoint) string {
	name := endpointChain(b.sp.Name, e)
	if _, done := b.endpoints[e.AddrPort]; done {
		return name
	}
	if b.endpoints == nil {
		b.endpoints = map[netip.AddrPort]struct{}{}
	}
	b.endpoints[e.AddrPort] = struct{}{}
	remember := " -m recent --name " + name + " --set --rsource"
	b.chains[nat] = append(b.chains[nat], chain{name, endpointLevel, []string{" -p " + b.proto + remember + dnat(e)}})
	return name
}

// affinitySeconds rounds up: an affinity that is asked for lasts at least that
// long, and the kernel takes no zero.
func (b *builder) affinitySeconds() int {
	return int(math.Ceil(b.sp.AffinityTimeout.Seconds()))
}
