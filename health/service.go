// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"signalbox/internal/httpserve"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// ServiceOptions are the parameters of NewServices.
type ServiceOptions struct {
	// Healthy reports whether the dataplane is healthy; nil: always.
	Healthy func() bool
	// Failed is called at the second failure in a row to listen at a Service's
	// port: a predecessor of this process may still have the port at the first.
	// It is also called when a server cannot accept connections. May be nil.
	Failed func(service plan.ServiceName, port uint16, err error)
	// Tried is called with the result of each attempt to listen; may be nil.
	Tried func(error)
	// State is called after a change. services counts the Services of a family
	// with a health check, failing the addresses of both families at which no
	// server can listen. May be nil.
	State func(family plan.Family, services, failing int)
	Log   *slog.Logger
	// Listen is net.Listen when nil.
	Listen func(network, addr string) (net.Listener, error)
}

// Services are the servers at the healthCheckNodePorts of Services, one for each
// address that serves NodePorts. Each IP family has its own servers, because it has
// its own endpoints.
type Services struct {
	opts ServiceOptions
	wake chan struct{} // holds a token after a change
	free chan struct{} // holds a token after PortsFree
	// retry ticks for retries; nil: every httpserve.RetryAfter. Tests set it.
	retry <-chan time.Time

	mu     sync.Mutex // guards wanted
	wanted map[plan.Family]*wanted

	servers map[socket]*server // used by Run alone
	ended   chan func()        // has Run process the end of a server; see serverEnded
}

// wanted is the latest state of a family.
type wanted struct {
	addrs  plan.NodePortAddrs
	checks map[plan.ServiceName]plan.HealthCheck
}

// socket identifies a server.
type socket struct {
	family plan.Family
	addr   netip.AddrPort
}

// server answers the health checks of one Service at one address.
type server struct {
	service  plan.ServiceName
	local    atomic.Int64 // local endpoints
	close    func()       // nil while it does not listen
	failures int          // to listen, in a row
}

// reportedFailure is the failure in a row that is reported; see
// ServiceOptions.Failed.
const reportedFailure = 2

// NewServices returns Services without any server.
func NewServices(opts ServiceOptions) *Services {
	if opts.Healthy == nil {
		opts.Healthy = func() bool { return true }
	}
	if opts.Listen == nil {
		opts.Listen = net.Listen
	}
	return &Services{
		opts: opts, wake: make(chan struct{}, 1), free: make(chan struct{}, 1), wanted: map[plan.Family]*wanted{},
		servers: map[socket]*server{}, ended: make(chan func()),
	}
}

// Synced takes the health checks of a plan that is in the kernel. It does not wait
// for sockets. It has the form of syncer.LoopOptions.Synced.
func (s *Services) Synced(r syncer.SyncReport) {
	if !r.Current {
		return
	}
	s.mu.Lock()
	w := s.wanted[r.Family]
	if w == nil {
		w = &wanted{}
		s.wanted[r.Family] = w
	}
	changed := r.HealthChecks != nil || w.addrs.All != r.NodePortAddrs.All || !slices.Equal(w.addrs.Addrs, r.NodePortAddrs.Addrs)
	w.addrs = r.NodePortAddrs
	if r.HealthChecks != nil {
		w.checks = r.HealthChecks
	}
	s.mu.Unlock()
	if changed {
		wait.Wake(s.wake)
	}
}

// Serve sets the families that are served. A family keeps its health checks until
// its next sync.
func (s *Services) Serve(families []plan.Family) {
	s.mu.Lock()
	maps.DeleteFunc(s.wanted, func(f plan.Family, _ *wanted) bool { return !slices.Contains(families, f) })
	s.mu.Unlock()
	wait.Wake(s.wake)
}

// PortsFree makes Run retry at once: a predecessor of this process has closed its
// ports.
func (s *Services) PortsFree() { wait.Wake(s.free) }

// Run opens and closes servers until ctx ends. When it returns, all are closed. It
// may be called again afterwards.
func (s *Services) Run(ctx context.Context) {
	retry := s.retry
	if retry == nil {
		ticker := time.NewTicker(httpserve.RetryAfter)
		defer ticker.Stop()
		retry = ticker.C
	}
	defer s.update(ctx, nil)
	s.update(ctx, s.sockets())
	s.reportState()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
			s.update(ctx, s.sockets())
		case <-s.free:
			for _, sv := range s.servers {
				if sv.failures < reportedFailure {
					sv.failures = 0 // the predecessor had the port
				}
			}
			s.listenAgain(ctx)
		case process := <-s.ended:
			process()
		case <-retry:
			s.listenAgain(ctx)
		}
		s.reportState()
	}
}

// target is the content of a socket's answers.
type target struct {
	service plan.ServiceName
	local   int
}

// sockets returns the servers that are wanted.
func (s *Services) sockets() map[socket]target {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[socket]target{}
	for family, w := range s.wanted {
		addrs := w.addrs.Addrs
		if w.addrs.All {
			addrs = []netip.Addr{plan.Unspecified(family)}
		}
		for name, check := range w.checks {
			for _, a := range addrs {
				all[socket{family, netip.AddrPortFrom(a, check.Port)}] = target{name, check.LocalEndpoints}
			}
		}
	}
	return all
}

// update makes the servers those of want. It closes before it opens, because a
// port may move from one Service to another.
func (s *Services) update(ctx context.Context, want map[socket]target) {
	maps.DeleteFunc(s.servers, func(at socket, sv *server) bool {
		if t, stays := want[at]; stays && t.service == sv.service {
			return false
		}
		if sv.close != nil {
			sv.close()
		}
		return true
	})
	for at, t := range want {
		sv := s.servers[at]
		if sv != nil {
			sv.local.Store(int64(t.local))
			continue
		}
		sv = &server{service: t.service}
		sv.local.Store(int64(t.local))
		s.servers[at] = sv
		s.listen(ctx, at, sv)
	}
}

// listenAgain retries where listening has failed.
func (s *Services) listenAgain(ctx context.Context) {
	for at, sv := range s.servers {
		if sv.close == nil {
			s.listen(ctx, at, sv)
		}
	}
}

// networks keep an IPv6 socket from taking the port in IPv4, too.
var networks = map[plan.Family]string{plan.IPv4: "tcp4", plan.IPv6: "tcp6"}

func (s *Services) listen(ctx context.Context, at socket, sv *server) {
	l, err := s.opts.Listen(networks[at.family], at.addr.String())
	if s.opts.Tried != nil {
		s.opts.Tried(err)
	}
	if err != nil {
		if sv.failures++; sv.failures == reportedFailure {
			s.reportFailure(at, sv, err)
		}
		return
	}
	if sv.failures >= reportedFailure {
		s.opts.Log.Info("a Service's health checks are answered now", "service", sv.service.String(), "address", at.addr.String())
	}
	sv.failures = 0
	ctx, cancel := context.WithCancel(ctx)
	closed := make(chan struct{})
	sv.close = func() {
		cancel()
		l.Close() // frees the port at once
		<-closed
	}
	go func() {
		defer close(closed)
		if err := httpserve.Serve(ctx, l, s.handler(sv), s.opts.Log); err != nil {
			select {
			case s.ended <- func() { s.serverEnded(at, sv, err) }:
			case <-ctx.Done():
			}
		}
	}()
}

// serverEnded processes that a server cannot accept connections any more, for example
// because the kernel lacks memory. A predecessor of this process is not the cause, so the
// first failure is reported.
func (s *Services) serverEnded(at socket, sv *server, err error) {
	sv.close()
	sv.close, sv.failures = nil, reportedFailure
	s.reportFailure(at, sv, err)
}

func (s *Services) reportFailure(at socket, sv *server, err error) {
	s.opts.Log.Error("a Service's health checks cannot be answered; its load balancer takes this node for dead; trying again",
		"service", sv.service.String(), "address", at.addr.String(), "every", httpserve.RetryAfter, "error", err)
	if s.opts.Failed != nil {
		s.opts.Failed(sv.service, at.addr.Port(), fmt.Errorf("healthCheckNodePort %d at %s: %w", at.addr.Port(), at.addr.Addr(), err))
	}
}

func (s *Services) reportState() {
	if s.opts.State == nil {
		return
	}
	s.mu.Lock()
	counts := map[plan.Family]int{}
	for family, w := range s.wanted {
		counts[family] = len(w.checks)
	}
	s.mu.Unlock()
	failing := 0
	for _, sv := range s.servers {
		if sv.close == nil {
			failing++
		}
	}
	for family, services := range counts {
		s.opts.State(family, services, failing)
	}
}

// serviceAnswer is the body of an answer.
type serviceAnswer struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int64 `json:"localEndpoints"`
	ServiceProxyHealthy bool  `json:"serviceProxyHealthy"`
}

// handler answers all paths, because load balancers use all kinds of them.
func (s *Services) handler(sv *server) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		a := serviceAnswer{LocalEndpoints: sv.local.Load(), ServiceProxyHealthy: s.opts.Healthy()}
		a.Service.Namespace, a.Service.Name = sv.service.Namespace, sv.service.Name
		body, err := json.MarshalIndent(a, "", "\t")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		setJSON(w.Header())
		// For load balancers that spread by weight.
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(a.LocalEndpoints, 10))
		if a.LocalEndpoints > 0 && a.ServiceProxyHealthy {
			w.WriteHeader(http.StatusOK)
		} else {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write(body)
	})
}
