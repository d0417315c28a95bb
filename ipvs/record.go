package ipvs

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier/plan"
)

// record is what stands for one Service port: elements of the table, virtual
// servers, and addresses to hold.
type record struct {
	port *plan.ServicePort
	// noScheduler is the scheduler that the Service port asks for and the kernel
	// has not got.
	noScheduler string
	elements    []nft.Element
	servers     []wanted
	vips        []netip.Addr
	// bases are the marks that the record holds in the pool.
	bases []uint32
	// marks says which mark each frontend leads to, from outside and inside.
	marks map[markKey]uint32
	// endpoints numbers the endpoints of a Service port with affinity.
	endpoints map[netip.AddrPort]uint32
}

// markKey is a frontend and whether it is about internal traffic.
type markKey struct {
	frontend plan.FrontendKey
	internal bool
}

// compiler turns Service ports into records.
type compiler struct {
	*nft.IPFamily
	schedulers schedulerChoice
	pool       *markPool
	// before finds the mark that a frontend has had so far, 0 for none.
	before func(markKey) uint32
	// numbered finds the marks that endpoints of a block have had so far.
	numbered func(block uint32) map[netip.AddrPort]uint32
	// claimed says which marks other Service ports of the batch have taken.
	claimed map[uint32]bool
	// foreign says whether another device than the mode's own holds a.
	foreign func(a netip.Addr) bool
	// class numbers a time-out of affinity.
	class func(time.Duration) (uint32, error)

	port      *plan.ServicePort
	scheduler string // of port
	out       *record
	sets      []*plan.EndpointSet
	ids       []uint32 // marks of sets; 0 where none is needed yet
}

// compile makes the record of a Service port. On error the pool is as it was.
func (c *compiler) compile(port *plan.ServicePort) (*record, error) {
	c.port, c.sets, c.ids = port, nil, nil
	c.out = &record{port: port, marks: make(map[markKey]uint32)}
	c.scheduler, c.out.noScheduler = c.schedulers.of(port)
	err := access.ValidatePort(c.IPFamily, c.port)
	if err != nil {
		err = fmt.Errorf("%s: %w", c.port.Name, err)
	} else {
		err = c.run()
	}
	if err != nil {
		for _, b := range c.out.bases {
			c.pool.release(b)
		}
		return nil, err
	}
	return c.out, nil
}

func (c *compiler) run() error {
	if c.sticky() {
		if err := c.takeBlock(); err != nil {
			return err
		}
	}
	for i := range c.port.Frontends {
		if err := c.frontend(&c.port.Frontends[i]); err != nil {
			return err
		}
	}
	if c.sticky() {
		c.compileEndpoints()
	}
	seen := make(map[netip.Addr]bool)
	for _, set := range c.sets {
		for _, e := range set.Endpoints {
			if e.MayHairpin && !seen[e.Addr()] {
				seen[e.Addr()] = true
				c.emit(hairpin, addrBytes(e.Addr())+addrBytes(e.Addr()), "")
			}
		}
	}
	return nil
}

func (c *compiler) sticky() bool { return c.port.AffinityTimeout > 0 }

func (c *compiler) emit(set nft.SetID, key, data string) {
	c.out.elements = append(c.out.elements, nft.Element{Set: set, Key: key, Data: data})
}

// frontend emits what one frontend needs.
func (c *compiler) frontend(fe *plan.Frontend) error {
	sets, name := setsOf(fe), c.port.Name
	key := access.FrontendBytes(fe.Key(name.Protocol))
	foreign := fe.Addr.IsValid() && c.foreign(fe.Addr)
	if fe.Addr.IsValid() && !foreign {
		c.out.vips = append(c.out.vips, fe.Addr)
	}
	if err := c.lead(fe, key, foreign); err != nil {
		return err
	}
	for _, o := range origins {
		if fe.Masquerade&o.origin != 0 {
			c.emit(sets.masquerade, key+nft.MarkKey(o.priority), "")
		}
	}
	if fe.External.Len() == 0 || fe.Internal.Len() == 0 {
		set := sets.rejected
		if fe.WhenEmpty == plan.Drop {
			set = sets.dropped
		}
		c.emit(set, key, "")
	}
	access.SourceElements(fe, name.Protocol, func(e nft.Element) { c.out.elements = append(c.out.elements, e) })
	if fe.Kind == plan.LoadBalancerIP && c.port.HealthCheckNodePort != 0 {
		c.emit(healthChecks, access.FrontendBytes(plan.FrontendKey{Addr: fe.Addr, Port: c.port.HealthCheckNodePort, Protocol: plan.TCP}), "")
	}
	return nil
}

// lead emits what leads packets to the frontend's virtual servers. One that is
// at an address of ours, goes to one set of endpoints and needs no affinity is
// known to IPVS by its address; all others by a mark, because IPVS takes no
// notice of where a packet comes from, has no address that means any address of
// the node, and remembers clients for each virtual server by itself. An address
// that another device holds gets a mark so that its servers can be told from
// others' at the next start.
func (c *compiler) lead(fe *plan.Frontend, key string, foreign bool) error {
	split := fe.Internal != fe.External
	fk := fe.Key(c.port.Name.Protocol)
	if fe.Addr.IsValid() && !foreign && !split && !c.sticky() {
		if fe.External.Len() > 0 {
			c.note(fe.External)
			c.emit(plainServers, key, "")
			c.out.servers = append(c.out.servers, wanted{
				key:       kernel.ServerKey{Addr: fe.Addr, Port: fe.Port, Protocol: c.port.Name.Protocol},
				scheduler: c.scheduler, dests: destsOf(fe.External), serving: c.port.Usable,
			})
		}
		return nil
	}
	sets := setsOf(fe)
	if fe.External.Len() > 0 {
		mark, err := c.markOf(fe.External, markKey{fk, false})
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
		if mark, err = c.markOf(fe.Internal, markKey{fk, true}); err != nil {
			return err
		}
	}
	c.emit(sets.internal, key, nft.MarkData(mark))
	return nil
}

// note remembers a set, and returns its place.
func (c *compiler) note(set *plan.EndpointSet) int {
	i := slices.Index(c.sets, set)
	if i < 0 {
		i = len(c.sets)
		c.sets = append(c.sets, set)
		c.ids = append(c.ids, 0)
	}
	return i
}

// markOf returns the mark of a set's virtual server, which is the one that it
// has had if that is possible.
func (c *compiler) markOf(set *plan.EndpointSet, k markKey) (uint32, error) {
	i := c.note(set)
	if c.ids[i] == 0 {
		mark, err := c.newMark(i, k)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", c.port.Name, err)
		}
		c.ids[i] = mark
		c.out.servers = append(c.out.servers, wanted{
			key:       kernel.ServerKey{Mark: mark, Protocol: c.port.Name.Protocol},
			scheduler: c.scheduler, dests: destsOf(set), serving: c.port.Usable,
		})
	}
	c.out.marks[k] = c.ids[i]
	return c.ids[i], nil
}

func (c *compiler) newMark(i int, k markKey) (uint32, error) {
	if c.sticky() {
		if i >= maxVariants {
			return 0, fmt.Errorf("a Service port with affinity can have %d different endpoint sets", maxVariants)
		}
		class, err := c.class(c.port.AffinityTimeout)
		return c.out.bases[0] | class<<variantBits | uint32(i), err
	}
	mark := c.before(k)
	if mark == 0 || mark == noEndpoints || isSticky(mark) || c.claimed[mark] || slices.Contains(c.out.bases, mark) {
		var err error
		if mark, err = c.pool.takeSet(); err != nil {
			return 0, err
		}
	} else {
		c.pool.hold(mark)
	}
	c.out.bases = append(c.out.bases, mark)
	return mark, nil
}

// takeBlock takes the marks of a Service port with affinity: those that it has
// had, for what clients are remembered by are these.
func (c *compiler) takeBlock() error {
	for i := range c.port.Frontends {
		for _, internal := range []bool{false, true} {
			mark := c.before(markKey{c.port.Frontends[i].Key(c.port.Name.Protocol), internal})
			if mark != 0 && isSticky(mark) && !c.claimed[baseOf(mark)] {
				c.pool.hold(mark)
				c.out.bases = []uint32{baseOf(mark)}
				return nil
			}
		}
	}
	block, err := c.pool.takeBlock()
	if err != nil {
		return fmt.Errorf("%s: %w", c.port.Name, err)
	}
	c.out.bases = []uint32{block}
	return nil
}

// compileEndpoints makes a virtual server of its own for each endpoint of a
// Service port with affinity. Endpoints beyond the number that a block has room
// for are used, but not remembered.
func (c *compiler) compileEndpoints() {
	block := c.out.bases[0]
	old := c.numbered(block)
	c.out.endpoints = make(map[netip.AddrPort]uint32)
	taken := make(map[uint32]bool, len(old))
	for _, mark := range old {
		taken[mark] = true
	}
	next := uint32(len(old)) // mostly free
	number := func(a netip.AddrPort) uint32 {
		if mark := old[a]; mark != 0 {
			return mark
		}
		for range maxKnownEndpoint {
			mark := block | endpointFlag | next%maxKnownEndpoint
			next++
			if !taken[mark] {
				taken[mark] = true
				return mark
			}
		}
		return 0
	}
	for v, set := range c.sets {
		if c.ids[v] == 0 {
			continue
		}
		for _, e := range set.Endpoints {
			mark, known := c.out.endpoints[e.AddrPort]
			if !known {
				if mark = number(e.AddrPort); mark == 0 {
					continue
				}
				c.out.endpoints[e.AddrPort] = mark
				c.emit(affinityMarks, nft.MarkKey(block)+addrPortBytes(e.AddrPort), nft.MarkData(mark))
				c.out.servers = append(c.out.servers, wanted{
					key:       kernel.ServerKey{Mark: mark, Protocol: c.port.Name.Protocol},
					scheduler: defaultScheduler, dests: []weighted{{e.AddrPort, 1}}, serving: c.port.Usable,
				})
			}
			c.emit(affinityMembers+nft.SetID(v), nft.MarkKey(mark), "")
		}
	}
}

func addrPortBytes(a netip.AddrPort) string {
	return addrBytes(a.Addr()) + string([]byte{byte(a.Port() >> 8), byte(a.Port()), 0, 0})
}
