package proxier

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// Tracker holds what the objects say and which Services are dirty: changed
// since they were last taken. It knows no kernel and no policy. It belongs to
// one goroutine.
type Tracker struct {
	nodeName string

	services map[ServiceName]*service
	// slices holds the slices of each Service, also of one that does not
	// exist (yet), sorted by name.
	slices map[ServiceName][]*endpointSlice
	// sliceOwners finds the Service that a slice was filed under: a slice may
	// change its label.
	sliceOwners  map[sliceName]ServiceName
	node         nodeObject
	serviceCIDRs map[string][]netip.Prefix // by name of the ServiceCIDR

	dirty     map[ServiceName]struct{}
	dirtyNode bool // what Node values are made from changed
	dirtyAll  bool // what every Service's endpoints are chosen by changed
}

// nodeObject is what this node's Node object says. The zero value stands for
// a node without one.
type nodeObject struct {
	zone      string
	podCIDRs  []netip.Prefix
	addresses []netip.Addr // the node's own, InternalIP before ExternalIP
}

// primary is the node's own address of a family; not valid where there is none.
func (n *nodeObject) primary(family Family) netip.Addr {
	for _, a := range n.addresses {
		if FamilyOf(a) == family {
			return a
		}
	}
	return netip.Addr{}
}

// NewTracker returns a Tracker for the node of that name, knowing nothing.
func NewTracker(nodeName string) *Tracker {
	return &Tracker{
		nodeName:     nodeName,
		services:     map[ServiceName]*service{},
		slices:       map[ServiceName][]*endpointSlice{},
		sliceOwners:  map[sliceName]ServiceName{},
		serviceCIDRs: map[string][]netip.Prefix{},
		dirty:        map[ServiceName]struct{}{},
	}
}

// Apply takes the object in its present form and returns what in it cannot be
// served. An object that says the same as before makes nothing dirty.
func (t *Tracker) Apply(obj runtime.Object) []Problem {
	switch obj := obj.(type) {
	case *corev1.Service:
		s, found := readService(obj)
		t.setService(ServiceName{obj.Namespace, obj.Name}, s)
		return found
	case *discoveryv1.EndpointSlice:
		s, found := readEndpointSlice(obj)
		t.setSlice(sliceName{obj.Namespace, obj.Name}, s)
		return found
	case *corev1.Node:
		if obj.Name != t.nodeName {
			return nil
		}
		n, found := readNode(obj)
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
		t.setService(ServiceName{obj.Namespace, obj.Name}, nil)
	case *discoveryv1.EndpointSlice:
		t.setSlice(sliceName{obj.Namespace, obj.Name}, nil)
	case *networkingv1.ServiceCIDR:
		t.setServiceCIDR(obj.Name, nil)
	}
}

func (t *Tracker) setService(name ServiceName, s *service) {
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
	if owner, filed := t.sliceOwners[name]; filed {
		i := slices.IndexFunc(t.slices[owner], func(x *endpointSlice) bool { return x.name == name })
		if s != nil && t.slices[owner][i].equal(s) {
			return
		}
		t.dirty[owner] = struct{}{}
		if s != nil && s.service == owner {
			t.slices[owner][i] = s
			return
		}
		t.unfileSlice(name, owner, i)
	}
	if s == nil {
		return
	}
	filed := t.slices[s.service]
	i, _ := slices.BinarySearchFunc(filed, name, func(x *endpointSlice, n sliceName) int { return compareSliceNames(x.name, n) })
	t.slices[s.service] = slices.Insert(filed, i, s)
	t.sliceOwners[name] = s.service
	t.dirty[s.service] = struct{}{}
}

func (t *Tracker) unfileSlice(name sliceName, owner ServiceName, i int) {
	delete(t.sliceOwners, name)
	t.slices[owner] = slices.Delete(t.slices[owner], i, i+1)
	if len(t.slices[owner]) == 0 {
		delete(t.slices, owner)
	}
}

func (t *Tracker) setNode(n nodeObject) {
	if t.node.zone != n.zone {
		t.dirtyAll = true
	}
	if !slices.Equal(t.node.addresses, n.addresses) {
		// Source ranges that cover the node admit its load-balancer IPs too.
		t.dirtyAll, t.dirtyNode = true, true
	}
	if !slices.Equal(t.node.podCIDRs, n.podCIDRs) {
		t.dirtyNode = true
	}
	t.node = n
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

// takeDirty returns the Services that changed since the last call, sorted, and
// whether the Node values changed.
func (t *Tracker) takeDirty() (names []ServiceName, node bool) {
	if t.dirtyAll {
		for name := range t.services {
			t.dirty[name] = struct{}{}
		}
	}
	names = make([]ServiceName, 0, len(t.dirty))
	for name := range t.dirty {
		names = append(names, name)
	}
	slices.SortFunc(names, compareServiceNames)
	node = t.dirtyNode
	clear(t.dirty)
	t.dirtyAll, t.dirtyNode = false, false
	return names, node
}

// cidrsOf returns the ranges of one family that cluster IPs are given from.
func (t *Tracker) cidrsOf(family Family) []netip.Prefix {
	var out []netip.Prefix
	for _, prefixes := range t.serviceCIDRs {
		for _, p := range prefixes {
			if FamilyOf(p.Addr()) == family {
				out = append(out, p)
			}
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

func readNode(obj *corev1.Node) (nodeObject, []Problem) {
	p := problems{kind: "Node", object: obj.Name}
	n := nodeObject{zone: obj.Labels[corev1.LabelTopologyZone]}
	cidrs := obj.Spec.PodCIDRs
	if len(cidrs) == 0 && obj.Spec.PodCIDR != "" {
		cidrs = []string{obj.Spec.PodCIDR}
	}
	n.podCIDRs = readPrefixes(&p, "spec.podCIDRs", cidrs)
	for _, want := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, address := range obj.Status.Addresses {
			if address.Type != want {
				continue
			}
			a, err := netip.ParseAddr(address.Address)
			if err != nil {
				p.add(indexed("status.addresses", i), "%q is not an IP address; it is left out", address.Address)
				continue
			}
			n.addresses = append(n.addresses, a.Unmap())
		}
	}
	return n, p.found
}

func readServiceCIDR(obj *networkingv1.ServiceCIDR) ([]netip.Prefix, []Problem) {
	p := problems{kind: "ServiceCIDR", object: obj.Name}
	return readPrefixes(&p, "spec.cidrs", obj.Spec.CIDRs), p.found
}

func readPrefixes(p *problems, field string, texts []string) []netip.Prefix {
	var out []netip.Prefix
	for i, text := range texts {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			p.add(indexed(field, i), "%q is not a CIDR; it is left out", text)
			continue
		}
		out = append(out, prefix.Masked())
	}
	return out
}

func (t *Tracker) serviceNames() []ServiceName {
	names := make([]ServiceName, 0, len(t.services))
	for name := range t.services {
		names = append(names, name)
	}
	slices.SortFunc(names, compareServiceNames)
	return names
}
