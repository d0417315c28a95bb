package ipvs

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"signalbox/proxier/plan"
)

// serverKey is what IPVS tells a virtual server by: a mark, or an address, port
// and protocol.
type serverKey struct {
	mark     uint32
	addr     netip.Addr
	port     uint16
	protocol plan.Protocol // of a marked server too, where IPVS has none
}

// String is the server as ipvsadm names it.
func (k serverKey) String() string {
	if k.mark != 0 {
		return fmt.Sprintf("-f %d", k.mark)
	}
	option := map[plan.Protocol]string{plan.TCP: "-t", plan.UDP: "-u", plan.SCTP: "--sctp-service"}[k.protocol]
	return option + " " + netip.AddrPortFrom(k.addr, k.port).String()
}

func (k serverKey) compare(o serverKey) int {
	return cmp.Or(cmp.Compare(k.mark, o.mark), k.addr.Compare(o.addr), cmp.Compare(k.protocol, o.protocol), cmp.Compare(k.port, o.port))
}

// id is the key as the kernel has it.
func (k serverKey) id() serverKey {
	if k.mark != 0 {
		return serverKey{mark: k.mark}
	}
	return k
}

// wanted is a virtual server as it is to be.
type wanted struct {
	key       serverKey
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

// verb is what one message to IPVS asks for.
type verb uint8

const (
	addServer verb = iota
	setServer
	addDest
	setDest
	removeDest
	removeServer
)

// op is one message to IPVS.
type op struct {
	verb      verb
	key       serverKey
	scheduler string
	dest      netip.AddrPort
	weight    int
}

// String is the op as the arguments of ipvsadm.
func (o op) String() string {
	switch o.verb {
	case addServer:
		return fmt.Sprintf("-A %s -s %s", o.key, o.scheduler)
	case setServer:
		return fmt.Sprintf("-E %s -s %s", o.key, o.scheduler)
	case addDest:
		return fmt.Sprintf("-a %s -r %s -m -w %d", o.key, o.dest, o.weight)
	case setDest:
		return fmt.Sprintf("-e %s -r %s -m -w %d", o.key, o.dest, o.weight)
	case removeDest:
		return fmt.Sprintf("-d %s -r %s", o.key, o.dest)
	}
	return fmt.Sprintf("-D %s", o.key)
}

// diff is what makes of a virtual server in the kernel the one that is wanted;
// have is nil for one that does not exist, and want is nil for one that is to
// go. What brings new connections comes in grow, which is to be written before
// packets are led to the server, and what ends them in shrink, for afterwards.
//
// A destination that is to go gets the weight 0, with which it keeps its open
// connections; see drain. Where nothing holds it, it goes at once.
func diff(have *server, want *wanted, key serverKey) (grow, shrink []op) {
	if have == nil {
		if want == nil {
			return nil, nil
		}
		have = &server{scheduler: want.scheduler}
		grow = append(grow, op{verb: addServer, key: key, scheduler: want.scheduler})
	}
	if want != nil && want.scheduler != have.scheduler {
		grow = append(grow, op{verb: setServer, key: key, scheduler: want.scheduler})
	}
	var dests []weighted
	var serving *plan.EndpointSet
	if want != nil {
		dests, serving = want.dests, want.serving
	}
	for _, d := range dests {
		switch now, exists := have.dests[d.addr]; {
		case !exists:
			grow = append(grow, op{verb: addDest, key: key, dest: d.addr, weight: d.weight})
		case now != d.weight:
			grow = append(grow, op{verb: setDest, key: key, dest: d.addr, weight: d.weight})
		}
	}
	left := 0
	for _, d := range sortedDests(have.dests) {
		if _, found := slices.BinarySearchFunc(dests, d, weighted.compare); found {
			continue
		}
		switch {
		case key.protocol == plan.UDP && !contains(serving, d):
			shrink = append(shrink, op{verb: removeDest, key: key, dest: d})
		case have.dests[d] != 0:
			shrink = append(shrink, op{verb: setDest, key: key, dest: d})
			left++
		default:
			left++
		}
	}
	if (want == nil || want.replaced) && left == 0 {
		shrink = append(shrink, op{verb: removeServer, key: key})
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

// opsText prints messages, one a line, as `ipvsadm --restore` reads them.
func opsText(ops []op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}

// defaultScheduler chooses in turn. Virtual servers with one destination, where
// there is nothing to choose, always have it.
const defaultScheduler = "rr"

// weightedKin is what takes the place of the mode's own scheduler where
// endpoints have weights and that one would not look at them.
var weightedKin = map[string]string{"rr": "wrr", "lc": "wlc"}

// schedulers chooses the scheduler of each Service port.
type schedulers struct {
	own string // for Services that name none
	// ask asks the kernel; nil where there is none to ask.
	ask   func(name string) (bool, error)
	known map[string]bool // what it answered
}

func newSchedulers(own string, ask func(string) (bool, error)) *schedulers {
	return &schedulers{own: cmp.Or(own, defaultScheduler), ask: ask, known: make(map[string]bool)}
}

func errNoScheduler(name string) error {
	return fmt.Errorf("the kernel has no scheduler %s: load the module ip_vs_%s (modprobe ip_vs_%s)", name, name, name)
}

// has says whether the kernel has a scheduler. One that cannot be asked for is
// taken to be there: what then uses it fails with the kernel's own words.
func (s *schedulers) has(name string) bool {
	if s.ask == nil || name == defaultScheduler { // which Supported has tried
		return true
	}
	has, asked := s.known[name]
	if asked {
		return has
	}
	has, err := s.ask(name)
	if err != nil {
		return true
	}
	s.known[name] = has
	return has
}

// forgetMissing makes schedulers be asked for again that were not there: a
// module can be loaded later.
func (s *schedulers) forgetMissing() {
	for name, has := range s.known {
		if !has {
			delete(s.known, name)
		}
	}
}

// of returns the scheduler of a Service port: the one that it asks for, or else
// the mode's own, or where endpoints have weights its kin that knows these. The
// kernel may lack what a Service asks for; then missing is that, and the Service
// is served like those that ask for nothing.
func (s *schedulers) of(port *plan.ServicePort) (name, missing string) {
	switch {
	case port.Scheduler == "":
		return s.unasked(port), ""
	case s.has(port.Scheduler):
		return port.Scheduler, ""
	}
	return s.unasked(port), port.Scheduler
}

func (s *schedulers) unasked(port *plan.ServicePort) string {
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
		errNoScheduler(p.state.records[name].noScheduler), p.schedulers.own)
	return plan.Problem{
		Kind: "Service", Object: name.ServiceName.String(), Field: plan.AnnotationField(plan.AnnotationScheduler), Reason: reason,
	}, true
}
