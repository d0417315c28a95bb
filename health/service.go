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
	"signalbox/proxier"
)

// ServiceOptions is what Services are made of.
type ServiceOptions struct {
	// Healthy says whether the dataplane is; nil: always. A node that offers no
	// /healthz is not for that reason a sick one.
	Healthy func() bool
	// Failed is told once when a Service's port cannot be listened on, at the
	// second failure in a row: a process that this one takes the place of has
	// it for a moment. May be nil.
	Failed func(service proxier.ServiceName, port uint16, err error)
	// Tried is told how each attempt to listen ended; may be nil.
	Tried func(error)
	// State is told, after a change, how many Services of a family have a
	// health check, and at how many addresses of both families a server should
	// listen and cannot; may be nil.
	State func(family proxier.Family, services, failing int)
	Log   *slog.Logger
	// Listen is net.Listen when nil.
	Listen func(network, addr string) (net.Listener, error)
}

// Services are the servers at the healthCheckNodePorts of Services: one for
// each address that serves NodePorts. Each IP family has its own, because each
// has its own endpoints.
type Services struct {
	opts ServiceOptions
	wake chan struct{} // holds one token while there is something new
	free chan struct{} // holds one token when ports may have come free
	// retry says when to listen again where that failed; nil: every
	// httpserve.RetryAfter. Tests have ticks of their own.
	retry <-chan time.Time

	mu     sync.Mutex // guards wanted
	wanted map[proxier.Family]*wanted

	// Of the goroutine of Run.
	open   map[socket]*server
	failed map[socket]*server // those whose address could not be had
}

// wanted is what a family was last told.
type wanted struct {
	addrs  proxier.NodePortAddrs
	checks map[proxier.ServiceName]proxier.HealthCheck
}

// socket is what one server has to itself.
type socket struct {
	family proxier.Family
	addr   netip.AddrPort
}

// server answers for one Service at one address.
type server struct {
	service proxier.ServiceName
	local   atomic.Int64
	close   func() // nil while it does not listen
	tries   int    // that failed in a row
}

// NewServices returns Services that know of none.
func NewServices(opts ServiceOptions) *Services {
	if opts.Healthy == nil {
		opts.Healthy = func() bool { return true }
	}
	if opts.Listen == nil {
		opts.Listen = net.Listen
	}
	return &Services{
		opts: opts, wake: make(chan struct{}, 1), free: make(chan struct{}, 1), wanted: map[proxier.Family]*wanted{},
		open: map[socket]*server{}, failed: map[socket]*server{},
	}
}

// Synced takes the health checks of a plan that is in the kernel. It has the
// form of proxier.LoopOptions.Synced, and does not wait for any socket.
func (s *Services) Synced(r proxier.SyncReport) {
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
		put(s.wake)
	}
}

// Serve notes which families are served from now on, each as it was until it is
// synced.
func (s *Services) Serve(families []proxier.Family) {
	s.mu.Lock()
	maps.DeleteFunc(s.wanted, func(f proxier.Family, _ *wanted) bool { return !slices.Contains(families, f) })
	s.mu.Unlock()
	put(s.wake)
}

// PortsFree has Run try at once to listen where it could not: a process that
// this one takes the place of has let go of its ports.
func (s *Services) PortsFree() { put(s.free) }

// put leaves a token where there is none.
func put(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run opens and closes servers until ctx ends, and returns nil then with all of
// them closed. It may be called again afterwards.
func (s *Services) Run(ctx context.Context) error {
	retry := s.retry
	if retry == nil {
		ticker := time.NewTicker(httpserve.RetryAfter)
		defer ticker.Stop()
		retry = ticker.C
	}
	defer s.settle(ctx, nil)
	s.settle(ctx, s.sockets())
	s.tellState()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
			s.settle(ctx, s.sockets())
		case <-s.free:
			for _, sv := range s.failed {
				if sv.tries == 1 {
					sv.tries = 0 // no blame for what the other had
				}
			}
			s.listenAgain(ctx)
		case <-retry:
			s.listenAgain(ctx)
		}
		s.tellState()
	}
}

// target is whom a socket is to answer for.
type target struct {
	service proxier.ServiceName
	local   int
}

// sockets are all that should be there.
func (s *Services) sockets() map[socket]target {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[socket]target{}
	for family, w := range s.wanted {
		addrs := w.addrs.Addrs
		if w.addrs.All {
			addrs = []netip.Addr{unspecified(family)}
		}
		for name, check := range w.checks {
			for _, a := range addrs {
				all[socket{family, netip.AddrPortFrom(a, check.Port)}] = target{name, check.LocalEndpoints}
			}
		}
	}
	return all
}

func unspecified(family proxier.Family) netip.Addr {
	if family == proxier.IPv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// settle makes the servers those that should be there. What is to be closed is
// closed before anything is opened: ports may change hands.
func (s *Services) settle(ctx context.Context, want map[socket]target) {
	for _, servers := range []map[socket]*server{s.open, s.failed} {
		maps.DeleteFunc(servers, func(at socket, sv *server) bool {
			t, stays := want[at]
			if stays && t.service == sv.service {
				return false
			}
			if sv.close != nil {
				sv.close()
			}
			return true
		})
	}
	for at, t := range want {
		sv := s.open[at]
		if sv == nil {
			sv = s.failed[at]
		}
		if sv == nil {
			sv = &server{service: t.service}
			sv.local.Store(int64(t.local))
			s.listen(ctx, at, sv)
		}
		sv.local.Store(int64(t.local))
	}
}

// listenAgain tries those again that failed.
func (s *Services) listenAgain(ctx context.Context) {
	for at, sv := range maps.Clone(s.failed) {
		s.listen(ctx, at, sv)
	}
}

// networks have IPv4 and IPv6 listen at one port without minding each other.
var networks = map[proxier.Family]string{proxier.IPv4: "tcp4", proxier.IPv6: "tcp6"}

func (s *Services) listen(ctx context.Context, at socket, sv *server) {
	l, err := s.opts.Listen(networks[at.family], at.addr.String())
	if s.opts.Tried != nil {
		s.opts.Tried(err)
	}
	if err != nil {
		s.failed[at] = sv
		if sv.tries++; sv.tries == 2 {
			s.tellFailure(at, sv, err)
		}
		return
	}
	if s.failed[at] != nil {
		s.opts.Log.Info("a Service's health checks are answered now", "service", sv.service.String(), "address", at.addr.String())
		delete(s.failed, at)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	sv.close = func() {
		cancel()
		l.Close() // the port is free now, whatever the server still does
		<-ended
	}
	go func() {
		defer close(ended)
		_ = httpserve.Serve(ctx, l, s.handler(sv), s.opts.Log)
	}()
	s.open[at] = sv
}

func (s *Services) tellFailure(at socket, sv *server, err error) {
	s.opts.Log.Error("a Service's health checks cannot be answered; its load balancer takes this node for dead; trying again",
		"service", sv.service.String(), "address", at.addr.String(), "every", httpserve.RetryAfter, "error", err)
	if s.opts.Failed != nil {
		s.opts.Failed(sv.service, at.addr.Port(), fmt.Errorf("healthCheckNodePort %d at %s: %w", at.addr.Port(), at.addr.Addr(), err))
	}
}

func (s *Services) tellState() {
	if s.opts.State == nil {
		return
	}
	s.mu.Lock()
	counts := map[proxier.Family]int{}
	for family, w := range s.wanted {
		counts[family] = len(w.checks)
	}
	s.mu.Unlock()
	for family, services := range counts {
		s.opts.State(family, services, len(s.failed))
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

// handler answers whatever is asked, as load balancers ask with all kinds of
// paths.
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
		// As load balancers that spread by weight expect it.
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.FormatInt(a.LocalEndpoints, 10))
		if a.LocalEndpoints > 0 && a.ServiceProxyHealthy {
			w.WriteHeader(http.StatusOK)
		} else {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write(body)
	})
}
