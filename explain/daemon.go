// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// Subject is the daemon under one configuration.
type Subject struct {
	Environment
	Loop       *syncer.Loop
	ModeReason string
	// Flows lists the connections that the kernel tracks.
	Flows FlowLister
	// Problems returns a line for each problem of the node and the configuration.
	Problems func() []string
}

// Daemon answers questions about a running daemon. Its methods may be called from any
// goroutine. It outlives a configuration.
type Daemon struct {
	version string
	started time.Time

	mu       sync.Mutex // guards what follows
	subject  Subject
	lastSync map[plan.Family]lastSync
	failing  map[string]FailingRequest // by resource
	rejected error                     // why the changed configuration is not in force
	foreign  map[plan.Family]bool      // other proxies' rules may be in force
}

// lastSync is a report with the time of its end.
type lastSync struct {
	syncer.SyncReport
	at time.Time
}

// NewDaemon returns a Daemon that knows nothing yet.
func NewDaemon(version string, started time.Time) *Daemon {
	return &Daemon{version: version, started: started, failing: map[string]FailingRequest{}, foreign: map[plan.Family]bool{}}
}

// Follow replaces the subject.
func (d *Daemon) Follow(s Subject) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subject, d.lastSync, d.failing = s, map[plan.Family]lastSync{}, map[string]FailingRequest{}
	clear(d.foreign)
}

// Synced has the form of syncer.LoopOptions.Synced.
func (d *Daemon) Synced(r syncer.SyncReport) {
	r.Triggers, r.HealthChecks = nil, nil
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastSync[r.Family] = lastSync{r, time.Now()}
}

// ConfigurationRejected sets the reason why the changed configuration is not in force;
// nil clears it.
func (d *Daemon) ConfigurationRejected(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.rejected = err
}

// ForeignRules records whether rules of another service proxy may be in force.
func (d *Daemon) ForeignRules(family plan.Family, present bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.foreign[family] = present
}

// problems has a line for each problem of the node and the configuration.
func (d *Daemon) problems() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	lines := append(d.subject.Problems(), d.subject.Loop.Fights()...)
	if d.rejected != nil {
		lines = append(lines, "the changed configuration is not in force: "+d.rejected.Error())
	}
	for _, family := range d.foreignFamilies() {
		lines = append(lines, "rules of another service proxy may be in force for "+family.String()+"; the log names them")
	}
	return lines
}

// failingRequests returns the requests to the API server that fail, sorted.
func (d *Daemon) failingRequests() []FailingRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.SortedFunc(maps.Values(d.failing), func(a, b FailingRequest) int { return cmp.Compare(a.Resource, b.Resource) })
}

// allProblems also has those of the API server.
func (d *Daemon) allProblems() []string {
	lines := d.problems()
	for _, r := range d.failingRequests() {
		lines = append(lines, "the API server "+r.String()+"; what signalbox knows may be old")
	}
	return lines
}

// Requested records the end of a request to the API server.
func (d *Daemon) Requested(resource string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		delete(d.failing, resource)
		return
	}
	since := time.Now()
	if before, fails := d.failing[resource]; fails {
		since = before.Since
	}
	d.failing[resource] = FailingRequest{resource, since, err.Error()}
}

// askTimeout bounds the wait for the Loop, which may be in a sync.
const askTimeout = 10 * time.Second

// Handler answers GET requests: /explain?target=TARGET&from=ADDRESS&kernel=BOOL,
// /frontends?target=TARGET, /status and /diff.
func (d *Daemon) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /explain", d.serveExplain)
	mux.HandleFunc("GET /frontends", d.serveFrontends)
	mux.HandleFunc("GET /status", d.serveStatus)
	mux.HandleFunc("GET /diff", d.serveDiff)
	return mux
}

func (d *Daemon) current() Subject {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.subject
	s.Foreign = d.foreignFamilies()
	return s
}

// foreignFamilies returns the families with rules of another service proxy. Its callers
// hold the lock.
func (d *Daemon) foreignFamilies() []plan.Family {
	return slices.DeleteFunc(slices.Clone(plan.Families), func(f plan.Family) bool { return !d.foreign[f] })
}

// ask has the Loop call fn, and waits for it no longer than askTimeout.
func (s *Subject) ask(r *http.Request, fn func(ctx context.Context)) error {
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	return s.Loop.Ask(ctx, func() { fn(ctx) })
}

func (d *Daemon) serveExplain(w http.ResponseWriter, r *http.Request) {
	q, err := ParseQuestion(r.FormValue("target"), r.FormValue("from"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var answer *Answer
	var nodeAddrs []netip.Addr
	s := d.current()
	err = s.ask(r, func(ctx context.Context) {
		answer, nodeAddrs = Explain(s.Loop, s.Environment, q), s.Loop.NodeAddrs()
		if r.FormValue("kernel") != "false" {
			answer.compare(ctx, s.Loop)
		}
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	answer.Problems = append(answer.Problems, d.allProblems()...)
	answer.Track(r.Context(), s.Flows, nodeAddrs) // not in the Loop: the table may be large
	reply(w, answer)
}

func (d *Daemon) serveStatus(w http.ResponseWriter, r *http.Request) {
	s := d.current()
	var known loopStatus
	err := s.ask(r, func(context.Context) { known = s.loopStatus() })
	status := d.status(known)
	if err != nil {
		status.Busy = err.Error()
	}
	reply(w, status)
}

func (d *Daemon) serveDiff(w http.ResponseWriter, r *http.Request) {
	s := d.current()
	diff := Diff{Mode: s.Mode}
	err := s.ask(r, func(ctx context.Context) {
		for _, family := range s.Loop.Families() {
			c, err := s.Loop.Compare(ctx, family)
			f := FamilyDiff{Family: family.String(), Lines: append(unwritten(s.Loop.State(family)), c.Differences...)}
			if err != nil {
				f.Error = err.Error()
			}
			diff.Families = append(diff.Families, f)
		}
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	reply(w, &diff)
}

// unwritten has a line for each Service port whose last change the kernel lacks.
func unwritten(s syncer.FamilyState) []string {
	lines := []string{}
	if s.Lags {
		lines = append(lines, "the kernel may lack the rules of each Service: its state is unknown, or a change of the node waits")
	}
	for i, name := range s.Waiting {
		if i == maxCompared {
			lines = append(lines, fmt.Sprintf("and the last changes of %d more Service ports", len(s.Waiting)-i))
			break
		}
		lines = append(lines, "the kernel lacks the last change of Service "+name.String())
	}
	if len(lines) > 0 && s.Failure != nil {
		lines = append(lines, fmt.Sprintf("syncs have failed since %s: %v", s.FailingSince.Format(time.RFC3339), s.Failure))
	}
	return lines
}

// maxCompared is how many lines of each kind an answer has.
const maxCompared = 50

// compare adds what the kernel has for the ports of the answer. The Loop's goroutine calls
// it.
func (a *Answer) compare(ctx context.Context, l *syncer.Loop) {
	for _, family := range l.Families() {
		var names []plan.ServicePortName
		for i := range a.Ports {
			if p := &a.Ports[i]; p.family() == family {
				names = append(names, p.name)
			}
		}
		if len(names) == 0 {
			continue
		}
		found, err := l.Compare(ctx, family, names...)
		c := Compared{Family: family.String(), HoldsCount: len(found.Holds), DifferencesCount: len(found.Differences)}
		c.Holds = append([]string{}, found.Holds[:min(len(found.Holds), maxCompared)]...)
		c.Differences = append([]string{}, found.Differences[:min(len(found.Differences), maxCompared)]...)
		c.Before = found.Before[:min(len(found.Before), maxCompared)]
		if err != nil {
			c.Error = err.Error()
		}
		a.Compared = append(a.Compared, c)
		switch {
		case len(found.Differences) > 0:
			a.doubt("The kernel has something else for %s than signalbox wrote (differences: %d)", family, len(found.Differences))
		case err != nil && !errors.Is(err, proxier.ErrNotCompared):
			a.doubt("The kernel is not compared for %s (%v)", family, err)
		}
	}
	a.judge()
}

// loopStatus is the part of a Status that only the Loop's goroutine knows.
type loopStatus struct {
	notServed map[plan.Family][]syncer.NotServed
	problems  []syncer.ObjectProblem
	objects   int // with problems
}

// maxObjects is of how many objects a Status has the problems.
const maxObjects = 50

// loopStatus is called by the Loop's goroutine.
func (s *Subject) loopStatus() loopStatus {
	known := loopStatus{notServed: map[plan.Family][]syncer.NotServed{}}
	for _, family := range s.Loop.Families() {
		known.notServed[family] = s.Loop.Quarantined(family)
	}
	known.problems, known.objects = s.Loop.ObjectProblems(maxObjects)
	return known
}

// status joins what the Loop knows with what is known without it.
func (d *Daemon) status(known loopStatus) *Status {
	problems, failing := d.problems(), d.failingRequests()
	d.mu.Lock()
	defer d.mu.Unlock()
	s, progress := d.subject, d.subject.Loop.Progress()
	o := progress.Objects
	out := &Status{
		Version: d.version, Started: d.started, Node: s.Node, Mode: s.Mode, ModeReason: s.ModeReason, Origin: s.Origin, Problems: problems,
		FailingRequests: failing, Objects: Objects{o.Services, o.EndpointSlices, o.Nodes, o.ServiceCIDRs}, ObjectsWithProblems: known.objects,
	}
	for _, p := range known.problems {
		out.ObjectProblems = append(out.ObjectProblems, ObjectProblem{p.Kind, p.Object, p.Field, p.Reason, p.Since})
	}
	if !progress.Synced {
		out.Problems = append(out.Problems, "not all objects are read yet; what the kernel had before still serves")
	}
	for _, family := range slices.Sorted(maps.Keys(progress.Pending)) {
		f := familyStatus(family, d.lastSync[family], progress.Pending[family])
		for _, n := range known.notServed[family] {
			f.NotServed = append(f.NotServed, NotServed(n))
		}
		out.Families = append(out.Families, f)
	}
	return out
}

func familyStatus(family plan.Family, last lastSync, pending time.Time) FamilyStatus {
	f := FamilyStatus{Family: family.String(), ServicePorts: last.Totals.ServicePorts, Endpoints: last.Totals.Endpoints}
	if !pending.IsZero() {
		f.PendingSince = &pending
	}
	if last.at.IsZero() {
		return f
	}
	f.LastSync = &LastSync{At: last.at, TookMillis: float64(last.Took.Microseconds()) / 1000, ServicePorts: last.ServicePorts, Everything: last.All}
	if last.Err != nil {
		f.LastSync.Error = last.Err.Error()
	}
	for _, k := range last.Kernel {
		f.Kernel = append(f.Kernel, KernelObject{k.Kind, k.Count})
	}
	return f
}

func reply(w http.ResponseWriter, body any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(body) // fails only if the client has gone
}
