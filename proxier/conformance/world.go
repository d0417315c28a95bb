// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/internal/netlab"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// world is one run of one scenario: a lab, and a Loop that drives the mode on
// its node1.
type world struct {
	lab      *netlab.Lab
	podLink  netlab.PodLink
	mode     Mode
	scenario *Scenario
	families []plan.Family
	settings service.Settings
	symbols  symbols

	objects  map[string]runtime.Object // "kind namespace/name" -> last applied form
	loop     *syncer.Loop              // nil while stopped
	proxiers map[plan.Family]proxier.Proxier
	flows    Flows
	conns    map[string]*heldConn
	crowd    map[netip.Addr]string // client -> who served it last

	mu       sync.Mutex // guards what follows
	problems []plan.Problem
	log      bytes.Buffer
}

var labs = map[string]netlab.Options{
	"routed":        {},
	"bridged":       {PodLink: netlab.Bridged},
	"routed-vxlan":  {Underlay: netlab.VXLAN},
	"bridged-vxlan": {PodLink: netlab.Bridged, Underlay: netlab.VXLAN},
}

// thirdNode has the Pod pod-e.
var thirdNode = append(slices.Clone(netlab.DefaultPods), netlab.PodSpec{Name: "pod-e", Node: "node3"})

// variant is one way to run a scenario.
type variant struct {
	lab, detectLocal string
	families         []plan.Family
}

func newWorld(mode Mode, s *Scenario, v variant) (*world, error) {
	if slices.Contains(s.Setup.Needs, "sctp") {
		if err := netlab.SCTP(); err != nil {
			return nil, err
		}
	}
	options := labs[v.lab]
	if s.Setup.ThreeNodes {
		options.Pods = thirdNode
	}
	lab, err := netlab.New(options)
	if err != nil {
		return nil, err
	}
	w := &world{
		lab: lab, podLink: options.PodLink, mode: mode, scenario: s, families: v.families,
		symbols: symbols{family: v.families[0], lab: lab},
		objects: map[string]runtime.Object{},
		conns:   map[string]*heldConn{},
	}
	if err := w.configure(v); err != nil {
		lab.Close()
		return nil, err
	}
	err = w.dropForwarded()
	for _, text := range everyCluster {
		if err == nil {
			err = w.take(text, false)
		}
	}
	if err != nil {
		lab.Close()
		return nil, err
	}
	return w, nil
}

func (w *world) dropForwarded() error {
	if !w.scenario.Setup.DropForwarded || w.mode.WithoutPackets {
		return nil
	}
	return w.onNode(func() error {
		for _, family := range w.families {
			if err := w.mode.DropForwarded(family); err != nil {
				return fmt.Errorf("dropping what node1 forwards: %w", err)
			}
		}
		return nil
	})
}

// everyCluster exists in every scenario; a scenario can apply other forms.
var everyCluster = []string{`
apiVersion: v1
kind: Node
metadata:
  name: node1
  labels: {topology.kubernetes.io/zone: zone-1}
spec:
  podCIDRs: ["$podCIDR@IPv4", "$podCIDR@IPv6"]
status:
  addresses:
  - {type: InternalIP, address: "$node1@IPv4"}
  - {type: InternalIP, address: "$node1@IPv6"}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata:
  name: kubernetes
spec:
  cidrs: ["$serviceCIDR@IPv4", "$serviceCIDR@IPv6"]
`}

func (w *world) configure(v variant) error {
	setup := &w.scenario.Setup
	w.settings = service.Settings{
		MasqueradeAll:          setup.MasqueradeAll,
		DetectLocal:            service.DetectLocal(v.detectLocal),
		PodBridgeInterface:     "cni0",
		PodInterfaceNamePrefix: "veth-",
		IgnoreExternalIPs:      setup.IgnoreExternalIPs,
		HasSchedulers:          w.mode.HasSchedulers,
		KubeProxyIPVSPolicies:  setup.KubeProxyIPVSPolicies,
		ResetRemovedEndpoints:  setup.ResetRemovedEndpoints,
	}
	if setup.LocalhostNodePorts {
		w.settings.LocalhostNodePorts = w.mode.LocalhostNodePorts
	}
	if setup.ClusterCIDR != "none" {
		for _, family := range w.families {
			p, err := w.prefix(setup.ClusterCIDR, family)
			if err != nil {
				return err
			}
			w.settings.ClusterCIDRs = append(w.settings.ClusterCIDRs, p)
		}
	}
	words, err := w.symbols.expand(strings.Join(setup.NodePortAddresses, ","))
	if err != nil || words == "" {
		return err
	}
	w.settings.NodePortAddresses, err = service.ParseNodePortAddresses(strings.Split(words, ","))
	return err
}

func (w *world) prefix(text string, family plan.Family) (netip.Prefix, error) {
	s := w.symbols
	s.family = family
	text, err := s.expand(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.ParsePrefix(text)
}

// run goes through the script and stops at the first step that fails.
func (w *world) run(ctx context.Context) error {
	if err := w.start(ctx, true); err != nil {
		return fmt.Errorf("at the start: %w", err)
	}
	for _, s := range w.scenario.steps {
		if s.packets && w.mode.WithoutPackets {
			continue
		}
		if err := s.do(ctx, w); err != nil {
			return fmt.Errorf("line %d: %s:\n%w", s.line, s.text, err)
		}
	}
	if err := w.noMoreProblems(); err != nil || !w.mode.WithoutPackets {
		return err
	}
	return w.sameAfterRestart(ctx)
}

func (w *world) noMoreProblems() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.problems) > 0 {
		return fmt.Errorf("problems were reported that the script does not name: %v", w.problems)
	}
	return nil
}

// sameAfterRestart compares what the mode wrote in many small changes with what
// a new Proxier writes for the same objects.
func (w *world) sameAfterRestart(ctx context.Context) error {
	before, err := w.dump()
	if err != nil {
		return err
	}
	if w.loop != nil {
		if err := w.stop(); err != nil {
			return err
		}
	}
	if err := w.start(ctx, true); err != nil {
		return fmt.Errorf("at the restart: %w", err)
	}
	after, err := w.dump()
	if err == nil && after != before {
		err = fmt.Errorf("a restart changes the state; before it, there was:%s", before)
	}
	return err
}

// start makes the mode and a Loop, as the daemon does. With synced it tells the
// Loop all objects and waits for the first sync; without, the Loop is told
// nothing.
func (w *world) start(ctx context.Context, synced bool) error {
	if w.loop != nil {
		return errors.New("it runs already")
	}
	w.proxiers = map[plan.Family]proxier.Proxier{}
	return w.onNode(func() (err error) {
		for _, family := range w.families {
			p, err := w.mode.New(proxier.Options{Family: family, MasqueradeMark: proxier.DefaultMasqueradeMark})
			if err != nil {
				return err
			}
			w.proxiers[family] = p
		}
		if w.mode.Flows != nil {
			if w.flows, err = w.mode.Flows(w.lab.Host("node1").Addrs); err != nil {
				return err
			}
		}
		w.loop = syncer.NewLoop(w.loopOptions())
		if err := w.tellNode(); err != nil {
			return err
		}
		if !synced {
			return w.loop.SyncNow(ctx)
		}
		for _, obj := range w.objects {
			w.loop.Apply(obj)
		}
		w.loop.Synced()
		return w.loop.SyncNow(ctx)
	})
}

// synced tells a Loop that was started unsynced the rest.
func (w *world) synced(ctx context.Context) error {
	if w.loop == nil {
		return errors.New("it does not run")
	}
	for _, obj := range w.objects {
		w.loop.Apply(obj)
	}
	w.loop.Synced()
	return w.sync(ctx)
}

func (w *world) loopOptions() syncer.LoopOptions {
	o := syncer.LoopOptions{
		NodeName: "node1", Settings: w.settings, Proxiers: w.proxiers,
		Logger: slog.New(slog.NewTextHandler(lockedWriter{w}, nil)),
		Report: func(p plan.Problem) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if known := w.mode.KnownProblem; known == "" || !strings.Contains(p.String(), known) {
				w.problems = append(w.problems, p)
			}
		},
	}
	if w.flows != nil {
		o.Flows = w.flows
	}
	return o
}

// stop ends the mode; its rules stay.
func (w *world) stop() error {
	if w.loop == nil {
		return errors.New("it does not run")
	}
	w.loop = nil
	return w.onNode(func() error {
		var failed []error
		for _, p := range w.proxiers {
			failed = append(failed, p.Close())
		}
		if w.flows != nil {
			w.flows.Close()
			w.flows = nil
		}
		return errors.Join(failed...)
	})
}

func (w *world) close() error {
	var failed []error
	for _, c := range w.conns {
		failed = append(failed, c.Close())
	}
	if w.loop != nil {
		failed = append(failed, w.stop())
	}
	return errors.Join(append(failed, w.lab.Close())...)
}

// onNode runs fn inside node1, where modes act.
func (w *world) onNode(fn func() error) error { return w.lab.Host("node1").Do(fn) }

// change applies or deletes the objects of manifests and syncs.
func (w *world) change(ctx context.Context, remove bool, files []string) error {
	for _, name := range files {
		name, err := w.symbols.expand(name)
		if err != nil {
			return err
		}
		text, ok := w.scenario.manifests[name]
		if !ok {
			return fmt.Errorf("the scenario has no file %s; it has %v", name, slices.Sorted(maps.Keys(w.scenario.manifests)))
		}
		if err := w.take(text, remove); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return w.sync(ctx)
}

func (w *world) take(text string, remove bool) error {
	text, err := w.symbols.expand(text)
	if err != nil {
		return err
	}
	objects, err := decode(text)
	if err != nil {
		return err
	}
	for _, obj := range objects {
		key := keyOf(obj)
		if remove {
			if w.objects[key] == nil {
				return fmt.Errorf("%s does not exist", key)
			}
			delete(w.objects, key)
		} else {
			w.objects[key] = obj
		}
		switch {
		case w.loop == nil:
		case remove:
			w.loop.Delete(obj)
		default:
			w.loop.Apply(obj)
		}
	}
	return nil
}

func (w *world) sync(ctx context.Context) error {
	if w.loop == nil {
		return nil
	}
	if err := w.onNode(func() error { return w.loop.SyncNow(ctx) }); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if w.flows == nil {
		return nil
	}
	return w.flows.Flush(ctx)
}

// gain gives an interface of node1 an address, at which node1 then answers.
func (w *world) gain(ctx context.Context, text, link string) error {
	a, err := w.addr(text)
	if err != nil {
		return err
	}
	node := w.lab.Host("node1")
	if err := node.AddAddrTo(link, a); err != nil {
		return err
	}
	for _, port := range []uint16{8080, netlab.ControlPort} {
		if err := node.Serve(netip.AddrPortFrom(a, port)); err != nil {
			return err
		}
	}
	return w.nodeChanged(ctx)
}

// lose takes an address from node1 that it gained on its main interface.
func (w *world) lose(ctx context.Context, text string) error {
	a, err := w.addr(text)
	if err != nil {
		return err
	}
	if err := w.lab.Host("node1").RemoveAddr(a); err != nil {
		return err
	}
	return w.nodeChanged(ctx)
}

// route has a route of node1 name a source address, or none.
func (w *world) route(ctx context.Context, to, source string) error {
	p, err := w.prefix(to, w.symbols.family)
	if err != nil {
		return err
	}
	var a netip.Addr
	if source != "anywhere" {
		if a, err = w.addr(source); err != nil {
			return err
		}
	}
	if err := w.lab.Host("node1").SetRouteSource(p, a); err != nil {
		return err
	}
	return w.nodeChanged(ctx)
}

func (w *world) nodeChanged(ctx context.Context) error {
	if err := w.tellNode(); err != nil {
		return err
	}
	return w.sync(ctx)
}

// tellNode tells the Loop what it needs to know of node1's addresses and routes.
func (w *world) tellNode() error {
	addrs, err := w.lab.Host("node1").Addrs()
	if err != nil {
		return err
	}
	return w.onNode(func() error {
		sources, err := node.ReadRouteSources()
		if err != nil {
			return err
		}
		w.loop.SetLocalAddrs(addrs)
		w.loop.SetRouteSources(sources.Served)
		servers, err := w.apiServers()
		w.loop.SetAPIServers(servers)
		return err
	})
}

func (w *world) apiServers() (servers []netip.AddrPort, err error) {
	for _, text := range w.scenario.Setup.APIServers {
		text, err := w.symbols.expand(text)
		if err != nil {
			return nil, err
		}
		at, err := target(text)
		if err != nil {
			return nil, err
		}
		servers = append(servers, at)
	}
	return servers, nil
}

// reported takes the problems that contain a text from those that were
// reported; there must be one.
func (w *world) reported(text string) error {
	text, err := w.symbols.expand(text)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.problems)
	w.problems = slices.DeleteFunc(w.problems, func(p plan.Problem) bool { return strings.Contains(p.String(), text) })
	if len(w.problems) == n {
		return fmt.Errorf("%w; there were %v", errNotReported, w.problems)
	}
	return nil
}

type lockedWriter struct{ w *world }

func (l lockedWriter) Write(b []byte) (int, error) {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	return io.Writer(&l.w.log).Write(b)
}
