// SPDX-License-Identifier: Apache-2.0

// Package follower is signalbox without a kernel, to find out what many nodes cost an API
// server.
package follower

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
	"signalbox/source/apiserver"
)

// Follower follows the API server and keeps the plan as the daemon does, in a mode that
// writes nothing. It has a connection of its own.
type Follower struct {
	source  *apiserver.Source
	loop    *syncer.Loop
	watched *watchedPort

	requests, bytes atomic.Int64
	synced          chan struct{} // closed after the first sync
	done            sync.WaitGroup
}

// New returns a Follower for the node of that name. LeadsTo asks about the watched Service
// port, in the first family.
func New(config *rest.Config, node string, watched plan.ServicePortName, families []plan.Family) (*Follower, error) {
	f := &Follower{watched: &watchedPort{name: watched}, synced: make(chan struct{})}
	config = rest.CopyConfig(config)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.Dial = f.dial // also keeps client-go from sharing connections between followers
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return counted{next, &f.requests} })
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.DiscardHandler)
	f.source = apiserver.New(client, node, log)
	proxiers := map[plan.Family]proxier.Proxier{families[0]: f.watched}
	for _, family := range families[1:] {
		proxiers[family] = &watchedPort{}
	}
	f.loop = syncer.NewLoop(syncer.LoopOptions{
		NodeName: node, Proxiers: proxiers, NodeOptional: true, Logger: log,
		Report: func(plan.Problem) {}, Synced: f.onSync(len(families)),
	})
	return f, nil
}

// onSync closes synced after the first sync of each family.
func (f *Follower) onSync(families int) func(syncer.SyncReport) {
	done := map[plan.Family]bool{}
	return func(r syncer.SyncReport) {
		if !done[r.Family] {
			done[r.Family] = true
			if len(done) == families {
				close(f.synced)
			}
		}
	}
}

// Run follows in the background until ctx ends. Wait waits for that.
func (f *Follower) Run(ctx context.Context) {
	f.done.Go(func() { _ = f.source.Run(ctx, f.loop) }) // both return nil when ctx ends
	f.done.Go(func() { _ = f.loop.Run(ctx) })
}

// Wait returns when the Follower has ended.
func (f *Follower) Wait() { f.done.Wait() }

// Synced is closed when the Follower has all Services.
func (f *Follower) Synced() <-chan struct{} { return f.synced }

// Received counts requests, and the bytes that the API server sent, encrypted as they were.
func (f *Follower) Received() (requests, bytes int64) { return f.requests.Load(), f.bytes.Load() }

// LeadsTo says whether the watched Service port leads to an endpoint.
func (f *Follower) LeadsTo(endpoint netip.AddrPort) bool {
	at := f.watched.at.Load()
	return at != nil && *at == endpoint
}

func (f *Follower) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, address)
	return countedConn{c, &f.bytes}, err
}

// countedConn counts the bytes that it receives.
type countedConn struct {
	net.Conn
	received *atomic.Int64
}

func (c countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

// counted counts requests.
type counted struct {
	next     http.RoundTripper
	requests *atomic.Int64
}

func (c counted) RoundTrip(r *http.Request) (*http.Response, error) {
	c.requests.Add(1)
	return c.next.RoundTrip(r)
}

// watchedPort is a mode that writes nothing and remembers where one Service port leads.
type watchedPort struct {
	proxier.Defaults
	name plan.ServicePortName
	at   atomic.Pointer[netip.AddrPort]
}

func (w *watchedPort) Sync(_ context.Context, p *plan.Plan, _ plan.Change) error {
	if port := p.Services[w.name]; port != nil && port.Usable.Len() > 0 {
		w.at.Store(&port.Usable.Endpoints[0].AddrPort)
	}
	return nil
}

func (w *watchedPort) Close() error { return nil }
