// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// record is a compiled Service port.
type record struct {
	port     *plan.ServicePort
	elements []nft.Element
	servers  []desiredServer
	// allocated are the marks, or the first mark of a range, that the record uses.
	allocated []uint32
	// marks are those of the frontends.
	marks map[markKey]uint32
	// missingScheduler is the scheduler that the Service asks for and the kernel lacks.
	missingScheduler string
}

// desiredServer is a virtual server that a Service port needs.
type desiredServer struct {
	key       kernel.ServerKey
	scheduler string
	// dests are sorted and unique, and have weights of at least 1.
	dests []kernel.Destination
	// usable are the endpoints that still answer. A UDP destination that does not answer is
	// removed immediately, because its clients do not notice.
	usable *plan.EndpointSet
	// listed are those of a TCP port that have not been removed; nil if connections to
	// removed endpoints go on.
	listed *plan.EndpointSet
	// replaced: the Service port has another server for these endpoints now. This server is
	// removed after its last connection.
	replaced bool
}

// ends says whether connections to a destination end at once.
func (s *desiredServer) ends(protocol plan.Protocol, destination netip.AddrPort) bool {
	return protocol == plan.UDP && !s.usable.Contains(destination) ||
		protocol == plan.TCP && s.listed != nil && !s.listed.Contains(destination)
}

// compiler compiles the Service ports of one batch.
type compiler struct {
	*nft.IPFamily
	schedulers schedulerChoice
	rules      *ruleset
	marks      *markPool
	// oldMarks are the marks that frontends have in the kernel.
	oldMarks map[markKey]uint32
	// endpointMarks finds the marks that endpoints of a Service port have in the kernel.
	endpointMarks func(firstMark uint32) map[netip.AddrPort]uint32
	// foreign says whether another device than the mode's has the address.
	foreign func(netip.Addr) bool

	used map[uint32]bool // marks of this batch's records
}

// compile makes the records of the named Service ports; nil for one that is not in the plan.
// On error no mark is allocated.
func (c *compiler) compile(desired *plan.Plan, names []plan.ServicePortName) (records []*record, err error) {
	c.used = make(map[uint32]bool)
	owners := make(map[kernel.ServerKey]plan.ServicePortName, len(names))
	for _, name := range names {
		port := desired.Services[name]
		if port == nil {
			records = append(records, nil)
			continue
		}
		pc := portCompiler{compiler: c, port: port, out: &record{port: port, marks: make(map[markKey]uint32)}}
		records = append(records, pc.out)
		err := pc.compile()
		for i := range pc.out.servers {
			key := pc.out.servers[i].key
			if owner, twice := owners[key]; twice && err == nil {
				err = fmt.Errorf("%s is %s's", key, owner)
			}
			owners[key] = name
		}
		if err != nil {
			for _, r := range records {
				c.marks.releaseAll(r)
			}
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for _, mark := range pc.out.allocated {
			c.used[mark] = true
		}
	}
	return records, nil
}

// portCompiler compiles one Service port.
type portCompiler struct {
	*compiler
	port      *plan.ServicePort
	scheduler string
	out       *record
	sets      []*plan.EndpointSet // in the order in which frontends use them
	setMarks  []uint32            // of sets; 0 for a set without a server by mark
}

func (c *portCompiler) compile() error {
	c.scheduler, c.out.missingScheduler = c.schedulers.of(c.port)
	if err := access.ValidatePort(c.IPFamily, c.port); err != nil {
		return err
	}
	if c.hasAffinity() {
		if err := c.allocateRange(); err != nil {
			return err
		}
	}
	for i := range c.port.Frontends {
		if err := c.frontend(&c.port.Frontends[i]); err != nil {
			return err
		}
	}
	if c.hasAffinity() {
		c.compileEndpoints()
	}
	c.hairpin()
	return nil
}

func (c *portCompiler) hasAffinity() bool { return c.port.AffinityTimeout > 0 }

func (c *portCompiler) emit(set nft.SetID, key, data string) {
	c.out.elements = append(c.out.elements, nft.Element{Set: set, Key: key, Data: data})
}

func (c *portCompiler) frontend(fe *plan.Frontend) error {
	sets, protocol := setsOf(fe), c.port.Name.Protocol
	key := access.FrontendBytes(fe.Key(protocol))
	virtual := fe.Addr.IsValid() && !fe.ForeignAddr && !c.foreign(fe.Addr)
	if virtual {
		c.emit(vips, addrBytes(fe.Addr), "")
	}
	if err := c.routeToServers(fe, key, virtual); err != nil {
		return err
	}
	for _, s := range trafficSources {
		if fe.Masquerade&s.source != 0 {
			c.emit(sets.masquerade, key+nft.MarkKey(s.priority), "")
		}
	}
	if fe.External.Len() == 0 || fe.Internal.Len() == 0 {
		c.out.elements = append(c.out.elements, access.RejectElement(fe, protocol, fe.WhenEmpty == plan.Drop, ""))
	}
	access.SourceElements(fe, protocol, func(e nft.Element) { c.out.elements = append(c.out.elements, e) })
	if fe.Kind == plan.LoadBalancerIP && c.port.HealthCheckNodePort != 0 {
		c.emit(healthChecks, access.FrontendBytes(plan.FrontendKey{Addr: fe.Addr, Port: c.port.HealthCheckNodePort, Protocol: plan.TCP}), "")
	}
	return nil
}

// routeToServers emits the frontend's virtual servers and the elements that lead packets to
// them. A virtual address with one endpoint set and without affinity has a server by address.
// All other frontends have servers by mark, because IPVS ignores where a packet comes from,
// has no server for any address of the node, and remembers clients for each server alone. At
// an address of another device, only the mark tells the server from those of other software.
func (c *portCompiler) routeToServers(fe *plan.Frontend, key string, virtual bool) error {
	split, frontend := fe.Internal != fe.External, fe.Key(c.port.Name.Protocol)
	if virtual && !split && !c.hasAffinity() {
		if fe.External.Len() > 0 {
			c.indexOf(fe.External)
			c.emit(serversByAddress, key, "")
			c.addServer(kernel.ServerKey{Addr: fe.Addr, Port: fe.Port}, c.scheduler, destinations(fe.External))
		}
		return nil
	}
	sets := setsOf(fe)
	if fe.External.Len() > 0 {
		mark, err := c.markOf(fe.External, markKey{frontend, false})
		if err != nil {
			return err
		}
		c.emit(sets.marks, key, nft.MarkData(mark))
	}
	if !split {
		return nil
	}
	mark := noEndpoints
	if fe.Internal.Len() > 0 {
		var err error
		if mark, err = c.markOf(fe.Internal, markKey{frontend, true}); err != nil {
			return err
		}
	}
	c.emit(sets.internal, key, nft.MarkData(mark))
	return nil
}

func (c *portCompiler) addServer(key kernel.ServerKey, scheduler string, dests []kernel.Destination) {
	key.Protocol = c.port.Name.Protocol
	c.out.servers = append(c.out.servers, desiredServer{key: key, scheduler: scheduler, dests: dests, usable: c.port.Usable, listed: c.port.Listed})
}

// indexOf returns the place of an endpoint set in sets.
func (c *portCompiler) indexOf(set *plan.EndpointSet) int {
	i := slices.Index(c.sets, set)
	if i < 0 {
		i = len(c.sets)
		c.sets = append(c.sets, set)
		c.setMarks = append(c.setMarks, 0)
	}
	return i
}

// markOf returns the mark of a set's virtual server, and adds the server if there is none.
func (c *portCompiler) markOf(set *plan.EndpointSet, k markKey) (uint32, error) {
	i := c.indexOf(set)
	if c.setMarks[i] == 0 {
		mark, err := c.newMark(i, k)
		if err != nil {
			return 0, err
		}
		c.setMarks[i] = mark
		c.addServer(kernel.ServerKey{Mark: mark}, c.scheduler, destinations(set))
	}
	c.out.marks[k] = c.setMarks[i]
	return c.setMarks[i], nil
}

// compileEndpoints adds a virtual server for each endpoint of a Service port with affinity.
// Endpoints for which the range has no room get connections, but are not remembered.
func (c *portCompiler) compileEndpoints() {
	first := c.out.allocated[0]
	marks := newEndpointMarks(first, c.endpointMarks(first))
	known := make(map[netip.AddrPort]uint32)
	for i, set := range c.sets {
		for _, e := range set.Endpoints {
			mark, seen := known[e.AddrPort]
			if !seen {
				if mark = marks.of(e.AddrPort); mark == 0 {
					continue
				}
				known[e.AddrPort] = mark
				c.emit(affinityMarks, nft.MarkKey(first)+addrPortBytes(e.AddrPort), nft.MarkData(mark))
				c.addServer(kernel.ServerKey{Mark: mark}, defaultScheduler, []kernel.Destination{{Addr: e.AddrPort, Weight: 1}})
			}
			c.emit(affinityMembers+nft.SetID(i), nft.MarkKey(mark), "")
		}
	}
}

// hairpin emits the endpoints that may be their own clients.
func (c *portCompiler) hairpin() {
	seen := make(map[netip.Addr]bool)
	for _, set := range c.sets {
		for _, e := range set.Endpoints {
			if e.MayHairpin && !seen[e.Addr()] {
				seen[e.Addr()] = true
				c.emit(hairpin, addrBytes(e.Addr())+addrBytes(e.Addr()), "")
			}
		}
	}
}

func destinations(set *plan.EndpointSet) []kernel.Destination {
	dests := make([]kernel.Destination, set.Len())
	for i, e := range set.Endpoints {
		dests[i] = kernel.Destination{Addr: e.AddrPort, Weight: int(max(e.Weight, 1))}
	}
	return dests
}

func addrBytes(a netip.Addr) string { return string(a.AsSlice()) }

func addrPortBytes(a netip.AddrPort) string {
	return string(nft.AppendPort(nft.AppendAddr(nil, a.Addr()), a.Port()))
}

// affinityTimeouts appends the affinity timeouts of Service ports that known lacks.
func affinityTimeouts(known []time.Duration, ports map[plan.ServicePortName]*plan.ServicePort) []time.Duration {
	var added []time.Duration
	for _, sp := range ports {
		if sp.AffinityTimeout > 0 && !slices.Contains(known, sp.AffinityTimeout) {
			added = append(added, sp.AffinityTimeout)
		}
	}
	slices.Sort(added)
	return slices.Concat(known, slices.Compact(added))
}

// defaultScheduler chooses in turn. A virtual server with one destination always has it.
const defaultScheduler = "rr"

// weightedVariants replace the scheduler of the flag for a Service port with weights.
var weightedVariants = map[string]string{"rr": "wrr", "lc": "wlc"}

// schedulerChoice chooses the scheduler of each Service port.
type schedulerChoice struct {
	own    string // for Service ports without the annotation
	kernel *kernel.Schedulers
}

func newSchedulerChoice(own string, ask func(string) (bool, error)) schedulerChoice {
	return schedulerChoice{own: cmp.Or(own, defaultScheduler), kernel: kernel.NewSchedulers(ask)}
}

// anyScheduler is the answer where there is no kernel to ask.
func anyScheduler(string) (bool, error) { return true, nil }

// has says whether the kernel has a scheduler. Supported has tried the default one.
func (s schedulerChoice) has(name string) bool { return name == defaultScheduler || s.kernel.Has(name) }

// of returns the scheduler of a Service port. If the kernel lacks the scheduler that the
// Service asks for, missing is its name, and the Service gets the scheduler of the flag.
func (s schedulerChoice) of(port *plan.ServicePort) (name, missing string) {
	if port.Scheduler != "" && s.has(port.Scheduler) {
		return port.Scheduler, ""
	}
	if weighted := weightedVariants[s.own]; weighted != "" && hasWeights(port) && s.has(weighted) {
		return weighted, port.Scheduler
	}
	return s.own, port.Scheduler
}

func hasWeights(port *plan.ServicePort) bool {
	heavy := func(set *plan.EndpointSet) bool {
		return set != nil && slices.ContainsFunc(set.Endpoints, func(e plan.Endpoint) bool { return e.Weight > 1 })
	}
	return slices.ContainsFunc(port.Frontends, func(f plan.Frontend) bool {
		return heavy(f.Internal) || f.External != f.Internal && heavy(f.External)
	})
}
