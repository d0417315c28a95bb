// SPDX-License-Identifier: Apache-2.0

package service

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier/plan"
)

// Sink is told about objects by a source. The objects are *corev1.Service,
// *discoveryv1.EndpointSlice, *corev1.Node and *networkingv1.ServiceCIDR; any
// other is ignored. A source hands an object over and never changes it
// afterwards. Calls may come from any goroutine and never block for long.
type Sink interface {
	// Apply says that the object exists in this form now.
	Apply(obj runtime.Object)
	// Delete says that the object is gone; only its kind, namespace and name
	// are looked at.
	Delete(obj runtime.Object)
	// Synced says that everything that existed when the source started has
	// been applied. Nothing is programmed before that, so that a node which
	// restarts never serves half of its Services. Only the first call counts.
	Synced()
}

// Tracker holds what the objects say and which Services are dirty: changed
// since they were last taken. It knows no kernel and no policy. It belongs to
// one goroutine.
type Tracker struct {
	nodeName        string
	externalIPCIDRs []netip.Prefix // see Settings

	services map[plan.ServiceName]*svc
	// unserved says why the other Services that exist are not in services.
	unserved map[plan.ServiceName]unserved
	// problems has the objects of which a part cannot be served.
	problems map[objectKey]objectProblems
	// slices holds the slices of each Service, also of one that does not
	// exist (yet), sorted by name.
	slices map[plan.ServiceName][]*endpointSlice
	// sliceOwners finds the Service that a slice was filed under: a slice may
	// change its label.
	sliceOwners  map[sliceName]plan.ServiceName
	node         nodeObject
	nodeExists   bool                      // as far as is known
	otherNodes   map[string]struct{}       // names of Node objects of other nodes
	serviceCIDRs map[string][]netip.Prefix // by name of the ServiceCIDR
	connections  []netip.AddrPort          // see SetAPIServers
	localAddrs   []netip.Addr

	dirty     map[plan.ServiceName]struct{}
	dirtyNode bool // what Node values are made from changed

	// triggers are when what changed slices of each family was changed, as
	// they say themselves, since they were last taken. What was changed before
	// started is old news, told by a first list.
	triggers map[plan.Family][]time.Time
	started  time.Time
}

// NewTracker returns a Tracker for the node of that name, knowing nothing.
func NewTracker(nodeName string, settings *Settings) *Tracker {
	return &Tracker{
		nodeName: nodeName, externalIPCIDRs: settings.ExternalIPCIDRs,
		services:     map[plan.ServiceName]*svc{},
		unserved:     map[plan.ServiceName]unserved{},
		problems:     map[objectKey]objectProblems{},
		slices:       map[plan.ServiceName][]*endpointSlice{},
		sliceOwners:  map[sliceName]plan.ServiceName{},
		otherNodes:   map[string]struct{}{},
		serviceCIDRs: map[string][]netip.Prefix{},
		dirty:        map[plan.ServiceName]struct{}{},
		started:      time.Now(),
	}
}

// Apply takes the object in its present form and returns what in it cannot be
// served. An object that says the same as before makes nothing dirty.
func (t *Tracker) Apply(obj runtime.Object) []plan.Problem {
	switch obj := obj.(type) {
	case *corev1.Service:
		s, found := readService(obj, t.externalIPCIDRs)
		name := plan.ServiceName{Namespace: obj.Namespace, Name: obj.Name}
		delete(t.unserved, name)
		if s == nil {
			t.unserved[name] = unserved{cmp.Or(notServed(obj), plan.InvalidName), readClusterIPs(&plan.Problems{}, obj)}
		}
		t.keepProblems(objectKey{"Service", obj.Namespace, obj.Name}, name, found)
		t.setService(name, s)
		return found
	case *discoveryv1.EndpointSlice:
		s, found := readEndpointSlice(obj)
		owner := plan.ServiceName{Namespace: obj.Namespace, Name: obj.Labels[discoveryv1.LabelServiceName]}
		t.keepProblems(objectKey{"EndpointSlice", obj.Namespace, obj.Name}, owner, found)
		t.setSlice(sliceName{obj.Namespace, obj.Name}, s)
		return found
	case *corev1.Node:
		if obj.Name != t.nodeName {
			t.otherNodes[obj.Name] = struct{}{}
			return nil
		}
		n, found := readNode(obj)
		t.nodeExists = true
		t.setNode(n)
		return found
	case *networkingv1.ServiceCIDR:
		prefixes, found := readServiceCIDR(obj)
		t.setServiceCIDR(obj.Name, prefixes)
		return found
	}
	return nil
}

// Delete forgets the object. A Node that is gone keeps what was last known of
// it: its Pods still run.
func (t *Tracker) Delete(obj runtime.Object) {
	switch obj := obj.(type) {
	case *corev1.Service:
		name := plan.ServiceName{Namespace: obj.Namespace, Name: obj.Name}
		delete(t.unserved, name)
		t.keepProblems(objectKey{"Service", obj.Namespace, obj.Name}, name, nil)
		t.setService(name, nil)
	case *discoveryv1.EndpointSlice:
		t.keepProblems(objectKey{"EndpointSlice", obj.Namespace, obj.Name}, plan.ServiceName{}, nil)
		t.setSlice(sliceName{obj.Namespace, obj.Name}, nil)
	case *corev1.Node:
		t.nodeExists = t.nodeExists && obj.Name != t.nodeName
		delete(t.otherNodes, obj.Name)
	case *networkingv1.ServiceCIDR:
		t.setServiceCIDR(obj.Name, nil)
	}
}

// notServed says why a Service is not in services.
func (t *Tracker) notServed(name plan.ServiceName) plan.Reason {
	return cmp.Or(t.unserved[name].reason, plan.NoService)
}

// unserved is a Service of which nothing is served.
type unserved struct {
	reason     plan.Reason
	clusterIPs []netip.Addr
}

func (t *Tracker) setService(name plan.ServiceName, s *svc) {
	old := t.services[name]
	switch {
	case old == nil && s == nil, old != nil && s != nil && old.equal(s):
		return
	case s == nil:
		delete(t.services, name)
	default:
		t.services[name] = s
	}
	t.dirty[name] = struct{}{}
}

func (t *Tracker) setSlice(name sliceName, s *endpointSlice) {
	if t.sliceOwners[name] == apiServerService || s != nil && s.service == apiServerService {
		defer t.changeAPIServers()()
	}
	if owner, filed := t.sliceOwners[name]; filed {
		i, _ := t.findSlice(owner, name)
		if s != nil && t.slices[owner][i].equal(s) {
			return
		}
		t.noteTrigger(t.slices[owner][i], s)
		t.dirty[owner] = struct{}{}
		if s != nil && s.service == owner {
			t.slices[owner][i] = s
			return
		}
		t.unfileSlice(name, owner, i)
	} else {
		t.noteTrigger(nil, s)
	}
	if s == nil {
		return
	}
	i, _ := t.findSlice(s.service, name)
	t.slices[s.service] = slices.Insert(t.slices[s.service], i, s)
	t.sliceOwners[name] = s.service
	t.dirty[s.service] = struct{}{}
}

// AddWithEndpoint adds the Services of which an EndpointSlice has an endpoint, whatever its
// conditions.
func (t *Tracker) AddWithEndpoint(to map[plan.ServiceName]bool, at plan.FrontendKey) {
	for name, list := range t.slices {
		if slices.ContainsFunc(list, func(s *endpointSlice) bool { return s.has(at) }) {
			to[name] = true
		}
	}
}

// findSlice returns where among a Service's slices one is, or belongs.
func (t *Tracker) findSlice(owner plan.ServiceName, name sliceName) (int, bool) {
	return slices.BinarySearchFunc(t.slices[owner], name, func(x *endpointSlice, n sliceName) int { return compareSliceNames(x.name, n) })
}

func (t *Tracker) unfileSlice(name sliceName, owner plan.ServiceName, i int) {
	delete(t.sliceOwners, name)
	t.slices[owner] = slices.Delete(t.slices[owner], i, i+1)
	if len(t.slices[owner]) == 0 {
		delete(t.slices, owner)
	}
}

// setNode makes only those Services dirty that depend on what changed: a
// Node's status is written every few minutes and mostly says the same.
func (t *Tracker) setNode(n nodeObject) {
	old := t.node
	t.node = n
	if old.zone != n.zone {
		t.dirtyWhere(func(name plan.ServiceName) bool {
			return slices.ContainsFunc(t.slices[name], (*endpointSlice).hasZoneHints)
		})
	}
	if old.primary(plan.IPv4) != n.primary(plan.IPv4) || old.primary(plan.IPv6) != n.primary(plan.IPv6) {
		t.dirtyNode = true
		// Source ranges that cover the node admit its load-balancer IPs too.
		t.dirtyWhere(func(name plan.ServiceName) bool { return len(t.services[name].sources) > 0 })
	}
	if !slices.Equal(old.podCIDRs, n.podCIDRs) {
		t.dirtyNode = true
	}
}

func (t *Tracker) dirtyWhere(affected func(plan.ServiceName) bool) {
	for name := range t.services {
		if affected(name) {
			t.dirty[name] = struct{}{}
		}
	}
}

func (t *Tracker) setServiceCIDR(name string, prefixes []netip.Prefix) {
	if slices.Equal(t.serviceCIDRs[name], prefixes) {
		return
	}
	if prefixes == nil {
		delete(t.serviceCIDRs, name)
	} else {
		t.serviceCIDRs[name] = prefixes
	}
	t.dirtyNode = true
}

// TakeChanges returns the Services that changed since the last call, sorted, and
// whether what Node values are made from changed.
func (t *Tracker) TakeChanges() (names []plan.ServiceName, node bool) {
	names, node = slices.SortedFunc(maps.Keys(t.dirty), plan.ServiceName.Compare), t.dirtyNode
	if len(names) > 0 {
		// A map keeps the size it once had, and walking or clearing it costs
		// that size: at the start every Service is dirty.
		t.dirty = map[plan.ServiceName]struct{}{}
	}
	t.dirtyNode = false
	return names, node
}

// noteTrigger remembers when a slice's change was made, once for each time that
// it tells. Nobody tells it of a deletion.
func (t *Tracker) noteTrigger(old, s *endpointSlice) {
	if s == nil || !s.trigger.After(t.started) || old != nil && old.trigger.Equal(s.trigger) {
		return
	}
	if t.triggers == nil {
		t.triggers = map[plan.Family][]time.Time{}
	}
	t.triggers[s.family] = append(t.triggers[s.family], s.trigger)
}

// TakeTriggerTimes returns what noteTrigger remembers for each family, and forgets it:
// also that of a family that nobody serves.
func (t *Tracker) TakeTriggerTimes() map[plan.Family][]time.Time {
	triggers := t.triggers
	t.triggers = nil
	return triggers
}

// Counts returns how many objects count at present.
func (t *Tracker) Counts() ObjectCounts {
	h := ObjectCounts{Services: len(t.services), EndpointSlices: len(t.sliceOwners), ServiceCIDRs: len(t.serviceCIDRs)}
	if t.nodeExists {
		h.Nodes = 1
	}
	return h
}

// NodeExists says whether this node's Node object exists, and names the Node
// objects of other nodes, sorted.
func (t *Tracker) NodeExists() (exists bool, others []string) {
	return t.nodeExists, slices.Sorted(maps.Keys(t.otherNodes))
}

// cidrsOf returns the ranges of one family that cluster IPs are given from.
func (t *Tracker) cidrsOf(family plan.Family) []netip.Prefix {
	var out []netip.Prefix
	for _, prefixes := range t.serviceCIDRs {
		for _, p := range prefixes {
			if plan.FamilyOf(p.Addr()) == family {
				out = append(out, p)
			}
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// ServiceNames returns every Service there is, and those given, sorted.
func (t *Tracker) ServiceNames(and []plan.ServiceName) []plan.ServiceName {
	names := slices.AppendSeq(slices.Clone(and), maps.Keys(t.services))
	slices.SortFunc(names, plan.ServiceName.Compare)
	return slices.Compact(names)
}

// ObjectCounts counts objects. Services that no proxy serves, and slices of these, are
// not held.
type ObjectCounts struct{ Services, EndpointSlices, Nodes, ServiceCIDRs int }
