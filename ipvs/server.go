package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"signalbox/ipvs/internal/kernel"

	"signalbox/proxier/plan"
)

// kernel is what the mode needs of IPVS, for one IP family.
type ipvsClient interface {
	// servers lists all virtual servers of the family, others' too.
	Servers() (map[kernel.ServerKey]string, error)
	Destinations(kernel.ServerKey) ([]kernel.Destination, error)
	// allDests returns those of all virtual servers at once, as far as that can
	// be had.
	AllDestinations() (map[kernel.ServerKey][]kernel.Destination, error)
	// send sends messages in order and tells done of each that the kernel has
	// followed. After one that it refuses only those go on that are on their
	// way. That there is nothing to remove is no refusal.
	Send(ops []kernel.Op, done func(kernel.Op)) error
	// hasScheduler says whether the kernel has, or can load, a scheduler.
	HasScheduler(name string) (bool, error)
	SetTimeouts(tcp, tcpFin, udp time.Duration) error
	Close()
}

// wanted is a virtual server as it is to be.
type wanted struct {
	key       kernel.ServerKey
	scheduler string
	// dests are sorted and unique; each has a weight of at least 1.
	dests []weighted
	// serving are the endpoints that still answer. A UDP destination that does
	// not is removed at once: its clients would not notice.
	serving *plan.EndpointSet
	// replaced is that another server leads to these endpoints now, and this one
	// is to go with its last connection.
	replaced bool
}

// weighted is a destination and its share of new connections.
type weighted struct {
	addr   netip.AddrPort
	weight int
}

// server is a virtual server in the kernel, as far as this process knows.
type server struct {
	scheduler string
	dests     map[netip.AddrPort]int // destination -> weight
}

// diff is what makes of a virtual server in the kernel the one that is wanted;
// have is nil for one that does not exist, and want is nil for one that is to
// go. What brings new connections comes in grow, which is to be written before
// packets are led to the server, and what ends them in shrink, for afterwards.
//
// A destination that is to go gets the weight 0, with which it keeps its open
// connections; see drain. Where nothing holds it, it goes at once.
func diff(have *server, want *wanted, key kernel.ServerKey) (grow, shrink []kernel.Op) {
	if have == nil {
		if want == nil {
			return nil, nil
		}
		have = &server{scheduler: want.scheduler}
		grow = append(grow, kernel.Op{Verb: kernel.AddServer, Key: key, Scheduler: want.scheduler})
	}
	if want != nil && want.scheduler != have.scheduler {
		grow = append(grow, kernel.Op{Verb: kernel.SetServer, Key: key, Scheduler: want.scheduler})
	}
	var dests []weighted
	var serving *plan.EndpointSet
	if want != nil {
		dests, serving = want.dests, want.serving
	}
	for _, d := range dests {
		switch now, exists := have.dests[d.addr]; {
		case !exists:
			grow = append(grow, kernel.Op{Verb: kernel.AddDestination, Key: key, Destination: d.addr, Weight: d.weight})
		case now != d.weight:
			grow = append(grow, kernel.Op{Verb: kernel.SetDestination, Key: key, Destination: d.addr, Weight: d.weight})
		}
	}
	left := 0
	for _, d := range sortedDests(have.dests) {
		if _, found := slices.BinarySearchFunc(dests, d, weighted.compare); found {
			continue
		}
		switch {
		case key.Protocol == plan.UDP && !contains(serving, d):
			shrink = append(shrink, kernel.Op{Verb: kernel.RemoveDestination, Key: key, Destination: d})
		case have.dests[d] != 0:
			shrink = append(shrink, kernel.Op{Verb: kernel.SetDestination, Key: key, Destination: d})
			left++
		default:
			left++
		}
	}
	if (want == nil || want.replaced) && left == 0 {
		shrink = append(shrink, kernel.Op{Verb: kernel.RemoveServer, Key: key})
	}
	return grow, shrink
}

func sortedDests(dests map[netip.AddrPort]int) []netip.AddrPort {
	list := make([]netip.AddrPort, 0, len(dests))
	for d := range dests {
		list = append(list, d)
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}

// contains says whether an endpoint of the set is at a.
func contains(set *plan.EndpointSet, a netip.AddrPort) bool {
	if set == nil {
		return false
	}
	_, found := slices.BinarySearchFunc(set.Endpoints, a, func(e plan.Endpoint, a netip.AddrPort) int {
		return cmp.Or(e.Addr().Compare(a.Addr()), cmp.Compare(e.Port(), a.Port()))
	})
	return found
}

func (d weighted) compare(a netip.AddrPort) int { return d.addr.Compare(a) }

func destsOf(set *plan.EndpointSet) []weighted {
	dests := make([]weighted, set.Len())
	for i, e := range set.Endpoints {
		dests[i] = weighted{e.AddrPort, int(max(e.Weight, 1))}
	}
	return dests
}

// defaultScheduler chooses in turn. Virtual servers with one destination, where
// there is nothing to choose, always have it.
const defaultScheduler = "rr"

// weightedKin is what takes the place of the mode's own scheduler where
// endpoints have weights and that one would not look at them.
var weightedKin = map[string]string{"rr": "wrr", "lc": "wlc"}

// schedulerChoice chooses the scheduler of each Service port.
type schedulerChoice struct {
	own    string // for Service ports without the annotation
	kernel *kernel.Schedulers
}

// anyScheduler is the answer where there is no kernel to ask.
func anyScheduler(string) (bool, error) { return true, nil }

func newSchedulerChoice(own string, ask func(string) (bool, error)) schedulerChoice {
	return schedulerChoice{own: cmp.Or(own, defaultScheduler), kernel: kernel.NewSchedulers(ask)}
}

// has says whether the kernel has a scheduler. It is not asked for the default one, which
// Supported has tried.
func (s schedulerChoice) has(name string) bool { return name == defaultScheduler || s.kernel.Has(name) }

// of returns the scheduler of a Service port: the one that it asks for, or else
// the mode's own, or where endpoints have weights its kin that knows these. The
// kernel may lack what a Service asks for; then missing is that, and the Service
// is served like those that ask for nothing.
func (s schedulerChoice) of(port *plan.ServicePort) (name, missing string) {
	switch {
	case port.Scheduler == "":
		return s.unasked(port), ""
	case s.has(port.Scheduler):
		return port.Scheduler, ""
	}
	return s.unasked(port), port.Scheduler
}

func (s schedulerChoice) unasked(port *plan.ServicePort) string {
	if kin := weightedKin[s.own]; kin != "" && hasWeights(port) && s.has(kin) {
		return kin
	}
	return s.own
}

func hasWeights(port *plan.ServicePort) bool {
	heavy := func(set *plan.EndpointSet) bool {
		return set != nil && slices.ContainsFunc(set.Endpoints, func(e plan.Endpoint) bool { return e.Weight > 1 })
	}
	return slices.ContainsFunc(port.Frontends, func(f plan.Frontend) bool {
		return heavy(f.Internal) || f.External != f.Internal && heavy(f.External)
	})
}

// Problem implements proxier.Proxier: a Service may ask for a scheduler that the
// kernel has not got.
func (p *Proxier) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == nil || p.state.records[name] == nil || p.state.records[name].noScheduler == "" {
		return plan.Problem{}, false
	}
	reason := fmt.Sprintf("%v, or name another; the Service has the mode's own, %s, and the kernel is asked again when everything is written anew",
		kernel.ErrNoScheduler(p.state.records[name].noScheduler), p.schedulers.own)
	return plan.Problem{
		Kind: "Service", Object: name.ServiceName.String(), Field: plan.AnnotationField(plan.AnnotationScheduler), Reason: reason,
	}, true
}
