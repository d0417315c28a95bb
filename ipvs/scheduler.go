package ipvs

import (
	"cmp"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"

	"signalbox/proxier"
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
	told  *toldSchedulers
}

// told is shared by the Proxiers of a process: a Service has one annotation for
// both families.
var told toldSchedulers

// toldSchedulers are the missing schedulers that the log tells already.
type toldSchedulers struct {
	mu sync.Mutex
	of map[proxier.ServiceName]string
}

// isNew says whether the log has yet to tell that a Service's scheduler is
// missing. The Service's other ports, its other family and changes of its
// endpoints are not told again.
func (t *toldSchedulers) isNew(service proxier.ServiceName, scheduler string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of[service] == scheduler {
		return false
	}
	if t.of == nil {
		t.of = make(map[proxier.ServiceName]string)
	}
	t.of[service] = scheduler
	return true
}

// forget is for a Service that has what it asks for, or is gone.
func (t *toldSchedulers) forget(service proxier.ServiceName) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.of, service)
}

func newSchedulers(own string, ask func(string) (bool, error)) *schedulers {
	return &schedulers{own: cmp.Or(own, defaultScheduler), ask: ask, known: make(map[string]bool), told: &told}
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

// forgetGone makes the log tell again of Services that come back.
func (s *schedulers) forgetGone(plan *proxier.Plan, names iter.Seq[proxier.ServicePortName]) {
	for name := range names {
		if plan.Services[name] == nil {
			s.told.forget(name.ServiceName)
		}
	}
}

// of returns the scheduler of a Service port: the one that it asks for, or else
// the mode's own, or where endpoints have weights its kin that knows these. The
// kernel may lack what a Service asks for; then the Service is served like
// those that ask for nothing.
func (s *schedulers) of(port *proxier.ServicePort) string {
	service := port.Name.ServiceName
	if port.Scheduler == "" {
		s.told.forget(service)
		return s.unasked(port)
	}
	if s.has(port.Scheduler) {
		s.told.forget(service)
		return port.Scheduler
	}
	instead := s.unasked(port)
	if !s.told.isNew(service, port.Scheduler) {
		return instead
	}
	slog.Error("ipvs: a Service asks for a scheduler that the kernel has not got; it is served with another, and the kernel is asked again when everything is written anew",
		"service", service.String(), "scheduler", port.Scheduler, "instead", instead, "error", errNoScheduler(port.Scheduler))
	return instead
}

func (s *schedulers) unasked(port *proxier.ServicePort) string {
	if kin := weightedKin[s.own]; kin != "" && hasWeights(port) && s.has(kin) {
		return kin
	}
	return s.own
}

func hasWeights(port *proxier.ServicePort) bool {
	heavy := func(set *proxier.EndpointSet) bool {
		return set != nil && slices.ContainsFunc(set.Endpoints, func(e proxier.Endpoint) bool { return e.Weight > 1 })
	}
	return slices.ContainsFunc(port.Frontends, func(f proxier.Frontend) bool {
		return heavy(f.Internal) || f.External != f.Internal && heavy(f.External)
	})
}
