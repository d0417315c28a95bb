package ipvs

import (
	"cmp"
	"fmt"
	"slices"

	"signalbox/proxier/plan"
)

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
