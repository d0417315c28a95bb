// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/proxier/syncer"
)

// world has a Service of every kind of frontend, with two endpoints on node1 in zone a
// and one on node2 in zone b. A fault changes it before or after the first sync.
type world struct {
	t        *testing.T
	service  *corev1.Service
	slice    *discoveryv1.EndpointSlice
	node     *corev1.Node
	others   []runtime.Object
	settings service.Settings
	servers  []netip.AddrPort // of the API
	// refused is what the kernel refuses after the first sync.
	refused error
	// broken is why the kernel refuses every sync.
	broken error
	// removed: other software has removed the rules.
	removed bool
	// before are rules of other software that come first, and inFront one that takes all.
	before  []string
	inFront string
	// alone: no daemon answers.
	alone bool
	// otherProxy are the families in which another service proxy has rules.
	otherProxy []plan.Family
	// foreign has a value for each change by other software.
	foreign chan proxier.Writer
	// problems are those that the daemon reports of its node.
	problems []string
	// halfRead: the API server gives no EndpointSlices, so the source has not synced.
	halfRead bool
	loop     *syncer.Loop
	// asked is called when the Loop looks at a Service port; it may be nil.
	asked func(plan.ServicePortName)
	// traits are those of the mode, and problem is what it reports of each port.
	traits  proxier.Traits
	problem string
}

func newWorld(t *testing.T) *world {
	endpoint := func(addr, node, zone, pod string) discoveryv1.Endpoint {
		return discoveryv1.Endpoint{
			Addresses: []string{addr}, NodeName: &node, Zone: &zone, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: pod},
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
		}
	}
	return &world{
		t: t, traits: proxier.Traits{GuardsClusterIPs: true}, foreign: make(chan proxier.Writer),
		service: &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10"}, ExternalIPs: []string{"198.51.100.7"},
				Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: 30080}},
			},
			Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.5"}}}},
		},
		slice: &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To[int32](8080)}},
			Endpoints: []discoveryv1.Endpoint{
				endpoint("10.244.1.5", "node1", "a", "web-0"), endpoint("10.244.1.6", "node1", "a", "web-1"), endpoint("10.244.2.7", "node2", "b", "web-2"),
			},
		},
		node: &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "node1", Labels: map[string]string{corev1.LabelTopologyZone: "a"}},
			Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}},
			Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}},
		},
		others:   []runtime.Object{&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}},
		settings: service.Settings{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}},
	}
}

// kernel accepts everything that is not refused.
type kernel struct {
	proxier.Defaults
	world   *world
	written bool
}

func (k *kernel) Sync(_ context.Context, p *plan.Plan, change plan.Change) error {
	if k.world.broken != nil {
		return k.world.broken
	}
	k.written = true
	for _, name := range change.Services {
		if name.Name == "web" && p.Services[name] != nil && k.world.refused != nil {
			return k.world.refused
		}
	}
	return nil
}

func (k *kernel) Close() error { return nil }

// Watch reports the changes by other software.
func (k *kernel) Watch(ctx context.Context, drifted func(proxier.Writer)) {
	for {
		select {
		case by := <-k.world.foreign:
			drifted(by)
		case <-ctx.Done():
			return
		}
	}
}

// Repair finds that each change makes a difference.
func (k *kernel) Repair(context.Context) (proxier.Difference, error) {
	return proxier.Difference{Objects: []string{"a rule"}}, nil
}

// Problem tells the test when the Loop looks at a Service.
func (k *kernel) Problem(name plan.ServicePortName) (plan.Problem, bool) {
	if k.world.asked != nil {
		k.world.asked(name)
	}
	return plan.Problem{Kind: "Service", Object: name.ServiceName.String(), Field: "spec.ports", Reason: k.world.problem}, k.world.problem != ""
}

// Compare knows the line of each Service port, and what other software removed.
func (k *kernel) Compare(_ context.Context, about ...plan.ServicePortName) (c proxier.Comparison, err error) {
	if !k.written {
		return c, proxier.ErrNothingWritten
	}
	if c.Before = k.world.before; k.world.inFront != "" {
		c.Differences = append(c.Differences, k.world.inFront)
	}
	for _, name := range about {
		if line := "rule of " + name.String(); k.world.removed {
			c.Differences = append(c.Differences, "-"+line)
		} else {
			c.Holds = append(c.Holds, line)
		}
	}
	return c, nil
}

// start makes a Loop that has synced the world's objects.
func (w *world) start() {
	w.loop = syncer.NewLoop(syncer.LoopOptions{
		NodeName: "node1", Settings: w.settings, Logger: slog.New(slog.DiscardHandler), Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: &kernel{world: w}},
	})
	w.loop.SetLocalAddrs([]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.244.1.1")})
	w.loop.SetAPIServers(w.servers)
	for _, obj := range append([]runtime.Object{w.service, w.slice, w.node}, w.others...) {
		w.loop.Apply(obj)
	}
	if !w.halfRead {
		w.loop.Synced()
	}
	if err := w.loop.SyncNow(w.t.Context()); !errors.Is(err, w.broken) {
		w.t.Fatal(err)
	}
}

// change applies the world's objects again, in their present form.
func (w *world) change() error {
	w.loop.Apply(w.service.DeepCopy())
	w.loop.Apply(w.slice.DeepCopy())
	return w.loop.SyncNow(w.t.Context())
}

func (w *world) ask(target, from string) *Answer {
	w.t.Helper()
	q, err := ParseQuestion(target, from)
	if err != nil {
		w.t.Fatal(err)
	}
	a := Explain(w.loop, Environment{Node: "node1", Mode: "test", Origin: "test", Live: !w.alone, Foreign: w.otherProxy, Traits: w.traits}, q)
	if !w.alone {
		a.compare(w.t.Context(), w.loop)
	}
	return a
}

// all changes every endpoint.
func (w *world) all(change func(*discoveryv1.Endpoint)) {
	for i := range w.slice.Endpoints {
		change(&w.slice.Endpoints[i])
	}
}

func (w *world) conditions(ready, serving, terminating bool) {
	w.all(func(e *discoveryv1.Endpoint) {
		e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}
	})
}

func (w *world) api(at string) { w.servers = []netip.AddrPort{netip.MustParseAddrPort(at)} }

func (w *world) local() {
	w.service.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func (w *world) tooLarge() {
	for i := range 20000 {
		w.service.Spec.ExternalIPs = append(w.service.Spec.ExternalIPs, fmt.Sprintf("100.64.%d.%d", i/250, i%250+1))
	}
}

func (w *world) remote() { w.all(func(e *discoveryv1.Endpoint) { e.NodeName = ptr.To("node2") }) }

func (w *world) zones(names ...string) {
	for i, name := range names {
		if name != "" {
			w.slice.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: name}}}
		}
	}
}

// loopback serves NodePorts on loopback, as a mode with these traits does.
func (w *world) loopback(traits proxier.Traits, at string) {
	w.traits, w.settings.NodePortAddresses.CIDRs = traits, []netip.Prefix{netip.MustParsePrefix(at)}
	w.settings.LocalhostNodePorts = map[proxier.LocalhostNodePorts]service.LocalhostNodePorts{
		proxier.LocalhostByRoute: service.LocalhostCovered, proxier.LocalhostByRelay: service.LocalhostNamed,
	}[traits.Localhost]
}

func (w *world) protocol(p corev1.Protocol) {
	w.service.Spec.Ports[0].Protocol, w.slice.Ports[0].Protocol = p, &p
}

// The traits of the modes that serve NodePorts on loopback.
var (
	asNFTables  = proxier.Traits{Localhost: proxier.LocalhostByRelay, LocalhostListens: true}
	asUserspace = proxier.Traits{Localhost: proxier.LocalhostByRelay, Refused: []plan.Protocol{plan.SCTP}}
	asIPTables  = proxier.Traits{Localhost: proxier.LocalhostByRoute}
	asIPVS      = proxier.Traits{GuardsClusterIPs: true, LeavesAPIServers: true}
)

// clone returns another Service of the same form, with these external IPs alone.
func (w *world) clone(name, clusterIP string, externalIPs ...string) *corev1.Service {
	s := w.service.DeepCopy()
	s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs = name, clusterIP, []string{clusterIP}
	s.Spec.ExternalIPs, s.Spec.Ports[0].NodePort, s.Status = externalIPs, 0, corev1.ServiceStatus{}
	return s
}

const (
	clusterIP = "10.96.0.10:80"
	pod       = "10.244.1.12"
	outside   = "192.0.2.99"
)

// TestFaults injects one fault each and demands the right verdict.
func TestFaults(t *testing.T) {
	for _, test := range []struct {
		fault        string
		inject       func(w *world)
		target, from string
		verdict      Verdict
		says         string // in a sentence, a problem or a reason
	}{
		{"none", func(*world) {}, clusterIP, pod, Served, "A new TCP connection from Pod 10.244.1.12 goes to one of 3 endpoints."},
		{"none, from the node", func(*world) {}, clusterIP, "192.0.2.1", Served, "from this node's 192.0.2.1 goes to one of 3"},
		{"none, at the NodePort", func(*world) {}, "192.0.2.1:30080", outside, Served, "from 192.0.2.99 goes to one of 3"},
		{"one endpoint is not ready", func(w *world) { w.slice.Endpoints[0].Conditions.Ready = ptr.To(false) }, clusterIP, pod, Served, "left out 10.244.1.5:8080: not ready"},
		{"no endpoint is ready", func(w *world) { w.conditions(false, false, false) }, clusterIP, pod, Refused, "the Service has no ready endpoint; 3 are not ready."},
		{"all endpoints terminate", func(w *world) { w.conditions(false, true, true) }, clusterIP, pod, Served, "used 10.244.1.5:8080: terminating and still serving"},
		{"one of three terminates", func(w *world) {
			w.slice.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: ptr.To(false), Serving: ptr.To(true), Terminating: ptr.To(true)}
		}, clusterIP, pod, Served, "left out 10.244.1.5:8080: terminating, while others are ready"},
		{"all endpoints have stopped", func(w *world) { w.conditions(false, false, true) }, clusterIP, pod, Refused, "3 are terminating and no longer serving"},
		{"no endpoint", func(w *world) { w.slice.Endpoints = nil }, clusterIP, pod, Refused, "its selector matches no Pod"},
		{"no slice belongs to the Service", func(w *world) { w.slice.Labels[discoveryv1.LabelServiceName] = "other" }, clusterIP, pod, Refused, "the Service has no endpoint"},
		{"the slice names no Service", func(w *world) { w.slice.Labels = nil }, clusterIP, pod, Refused, "the Service has no endpoint"},
		{"wrong port name", func(w *world) { w.slice.Ports[0].Name = ptr.To("web") }, clusterIP, pod, Refused, `no EndpointSlice has the port "http" with tcp; default/web-1 has web/tcp.`},
		{"wrong protocol", func(w *world) { w.slice.Ports[0].Protocol = ptr.To(corev1.ProtocolUDP) }, clusterIP, pod, Refused, "default/web-1 has http/udp"},
		{"wrong address family", func(w *world) {
			w.slice.AddressType = discoveryv1.AddressTypeIPv6
			w.all(func(e *discoveryv1.Endpoint) { e.Addresses = []string{"fd00::5"} })
		}, clusterIP, pod, Refused, "no IPv4 endpoint; default/web-1 is of the other IP family"},
		{"forbidden addresses", func(w *world) { w.all(func(e *discoveryv1.Endpoint) { e.Addresses = []string{"127.0.0.1"} }) }, clusterIP, pod, Refused, `"127.0.0.1" is a loopback`},
		{"weight 0", func(w *world) { w.service.Annotations = map[string]string{plan.AnnotationWeights: "*=0"} }, clusterIP, pod, Refused, "3 are of weight 0"},
		{"policy Local without a local endpoint", func(w *world) { w.local(); w.remote() }, "192.0.2.1:30080", outside, Dropped, "the traffic policy is Local, and no usable endpoint is on this node; 3 are not on this node."},
		{"policy Local, from a Pod of this node", func(w *world) { w.local(); w.remote() }, "203.0.113.5:80", pod, Served, "does not apply to this node's own Pods"},
		{"policy Local, from outside", func(w *world) { w.local() }, "203.0.113.5:80", outside, Served, "left out 10.244.2.7:8080: not on this node"},
		{"internal policy Local without a local endpoint", func(w *world) {
			w.service.Spec.InternalTrafficPolicy = ptr.To(corev1.ServiceInternalTrafficPolicyLocal)
			w.remote()
		}, clusterIP, pod, Dropped, "3 are not on this node"},
		{"policy Local as in kube-proxy's ipvs mode", func(w *world) { w.local(); w.remote(); w.settings.KubeProxyIPVSPolicies = true }, "192.0.2.1:30080", outside, Served, "--ipvs-kube-proxy-policies allows others"},
		{"policy Local, no endpoint is ready, and all are elsewhere", func(w *world) { w.local(); w.remote(); w.conditions(false, false, false) }, "192.0.2.1:30080", outside, Refused, "the Service has no ready endpoint; 3 are not ready."},
		{"policy Local without any endpoint", func(w *world) { w.local(); w.slice.Endpoints = nil }, "192.0.2.1:30080", outside, Refused, "no endpoint"},
		{"endpoints carry another name of this node", func(w *world) {
			w.local()
			w.all(func(e *discoveryv1.Endpoint) { e.NodeName = ptr.To("node1.example.com") })
		}, "192.0.2.1:30080", outside, Dropped, "3 are not on this node"},
		{"the Node object has another name", func(w *world) { w.node.Name, w.alone = "node1.example.com", true }, clusterIP, pod, Served, `no Node object is named "node1"`},
		{"source ranges exclude the client", func(w *world) { w.service.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15"} }, "203.0.113.5:80", outside, Dropped, "loadBalancerSourceRanges admits 198.18.0.0/15."},
		{"source ranges admit the client", func(w *world) { w.service.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24"} }, "203.0.113.5:80", outside, Served, "one of 3"},
		{"source ranges are malformed", func(w *world) { w.service.Spec.LoadBalancerSourceRanges = []string{"10.0.0.0/33"} }, "203.0.113.5:80", outside, Dropped, "it admits nobody"},
		{"source ranges do not count at the cluster IP", func(w *world) { w.service.Spec.LoadBalancerSourceRanges = []string{"198.18.0.0/15"} }, clusterIP, outside, Served, "one of 3"},
		{"zone hints", func(w *world) { w.zones("a", "a", "b") }, clusterIP, pod, Served, "left out 10.244.2.7:8080: meant for other zones"},
		{"zone hints are incomplete", func(w *world) { w.zones("a", "", "b") }, clusterIP, pod, Served, "zone hints: not used, because ready endpoints have none"},
		{"zone hints name other zones", func(w *world) { w.zones("c", "c", "b") }, clusterIP, pod, Served, "zone hints: not used, because none of them is for this place"},
		{"the Node has no zone", func(w *world) { w.zones("a", "a", "b"); w.node.Labels = nil }, clusterIP, pod, Served, "the Node object does not say where this node is"},
		{"node hints", func(w *world) {
			w.all(func(e *discoveryv1.Endpoint) {
				e.Hints = &discoveryv1.EndpointHints{ForNodes: []discoveryv1.ForNode{{Name: *e.NodeName}}}
			})
		}, clusterIP, pod, Served, "left out 10.244.2.7:8080: meant for other nodes"},
		{"the kernel refuses the Service", func(w *world) { w.refused = errors.New("no buffer space available") }, clusterIP, pod, Unknown, "The kernel has refused the rules of Service default/web:http since"},
		{"the kernel refuses every sync", func(w *world) { w.broken = errors.New("operation not permitted") }, clusterIP, pod, Unknown, "each sync of IPv4 has failed since"},
		{"its rules are gone from the kernel", func(w *world) { w.removed = true }, clusterIP, pod, Unknown, "The kernel has something else for IPv4 than signalbox wrote (differences: 1)"},
		{"a foreign rule in front takes all", func(w *world) { w.inFront = "iptables -t nat -A PREROUTING -j ACCEPT comes before" }, clusterIP, pod, Unknown, "(differences: 1)"},
		{"a foreign rule in front takes some", func(w *world) { w.before = []string{"iptables -t nat -A PREROUTING -j DOCKER"} }, clusterIP, pod, Served, "one of 3"},
		{"rules of another proxy", func(w *world) { w.otherProxy = []plan.Family{plan.IPv4} }, clusterIP, pod, Unknown, "Rules of another service proxy may be in force for IPv4"},
		{"the Service is too large", func(w *world) { w.tooLarge() }, "default/web", "", Unknown, "Service default/web is not served: each port has"},
		{"headless", func(w *world) { w.service.Spec.ClusterIP, w.service.Spec.ClusterIPs = "None", []string{"None"} }, "default/web", "", Unknown, "it is headless"},
		{"ExternalName", func(w *world) {
			w.service.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}
		}, "default/web", "", Unknown, "its type is ExternalName"},
		{"another proxy has it by its label", func(w *world) { w.service.Labels = map[string]string{service.LabelServiceProxyName: "cilium"} }, "default/web", "", Unknown, "hands it to another proxy"},
		{"no cluster IP yet", func(w *world) { w.service.Spec.ClusterIP, w.service.Spec.ClusterIPs = "", nil }, "default/web", "", Unknown, "it has no cluster IP yet"},
		{"a family that is not served", func(w *world) { w.service.Spec.ClusterIP, w.service.Spec.ClusterIPs = "fd00::10", []string{"fd00::10"} }, "default/web", "", Unknown, "no cluster IP of an IP family that signalbox serves here"},
		{"the client is of the other family", func(*world) {}, "default/web", "fd00::1", Unknown, "Service default/web is served for IPv4, and the client's address fd00::1 is of the other IP family."},
		{"no such Service, and the client is of the other family", func(*world) {}, "default/wbe", "fd00::1", Unknown, "There is no Service default/wbe"},
		{"no such port, and the client is of the other family", func(*world) {}, "default/web:443", "fd00::1", Unknown, "Service default/web has no port 443"},
		{"policy Local without a local endpoint, by the DNS name", func(w *world) { w.local(); w.remote() }, "web.default.svc:80", "", Served, "from any client to 10.96.0.10:80/tcp goes to one of 3"},
		{"no such Service", func(*world) {}, "default/wbe", "", Unknown, "There is no Service default/wbe"},
		{"no such port of the Service", func(*world) {}, "default/web:443", "", Unknown, "Service default/web has no port 443; it has http 80/tcp."},
		{"wrong port by the DNS name", func(*world) {}, "web.default.svc:81", pod, Refused, "No Service that signalbox serves has 10.96.0.10:81/tcp; at this address there is default/web:http for port 80/tcp. A new connection is refused"},
		{"wrong protocol by the DNS name", func(*world) {}, "web.default.svc:80/udp", "", Refused, "No Service that signalbox serves has 10.96.0.10:80/udp"},
		{"wrong port by the DNS name, in a mode without a rule for it", func(w *world) { w.traits.GuardsClusterIPs = false }, "web.default.svc:81", pod, Unknown, "the node's routes decide"},
		{"wrong port by the DNS name, and the kernel refuses every sync", func(w *world) { w.broken = errors.New("operation not permitted") }, "web.default.svc:81", pod, Unknown, "A sync is due"},
		{"wrong port by the DNS name, beside rules of another proxy", func(w *world) { w.otherProxy = []plan.Family{plan.IPv4} }, "web.default.svc:81", pod, Unknown, "another service proxy"},
		{"wrong port by the DNS name, and the client is of the other family", func(*world) {}, "web.default.svc:81", "fd00::1", Unknown, "Service default/web has no port 81/tcp"},
		{"wrong port by the DNS name, and an API server has it, from the node", func(w *world) { w.api("10.96.0.10:81") }, "web.default.svc:81", "192.0.2.1", Unknown, "An API server is there"},
		{"the DNS name of a Service that does not exist", func(*world) {}, "wbe.default.svc:80", pod, Unknown, "There is no Service default/wbe"},
		{"wrong port at the cluster IP", func(*world) {}, "10.96.0.10:443", pod, Refused, "at this address there is default/web:http for port 80/tcp. A new connection is refused"},
		{"wrong port at the cluster IP, in a mode without a rule for it", func(w *world) { w.traits.GuardsClusterIPs = false }, "10.96.0.10:443", pod, Unknown, "the node's routes decide"},
		{"wrong port at the cluster IP, beside rules of another proxy", func(w *world) { w.otherProxy = []plan.Family{plan.IPv4} }, "10.96.0.10:443", pod, Unknown, "another service proxy"},
		{"wrong port at an external IP", func(*world) {}, "198.51.100.7:443", pod, Unknown, "at this address there is default/web:http for port 80/tcp"},
		{"wrong protocol at the cluster IP", func(*world) {}, "10.96.0.10:80/udp", pod, Refused, "No Service that signalbox serves has 10.96.0.10:80/udp"},
		{"an unallocated cluster IP", func(*world) {}, "10.96.0.99:80", pod, Dropped, "in the range of cluster IPs, and no Service that signalbox knows has it. A new connection is dropped"},
		{"an unallocated cluster IP, in a mode without a rule for it", func(w *world) { w.traits.GuardsClusterIPs = false }, "10.96.0.99:80", pod, Unknown, "the node's routes decide"},
		{"an API server at an unallocated cluster IP, from the node", func(w *world) { w.api("10.96.0.99:80") }, "10.96.0.99:80", "192.0.2.1", Unknown, "An API server is there, and this node connects to it directly."},
		{"an API server at an unallocated cluster IP, from a Pod", func(w *world) { w.api("10.96.0.99:80") }, "10.96.0.99:80", pod, Dropped, "A new connection is dropped"},
		{"an unallocated cluster IP that the node has", func(w *world) {
			w.node.Status.Addresses = append(w.node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "10.96.0.99"})
		}, "10.96.0.99:80", pod, Unknown, "in the range of cluster IPs"},
		{"an unallocated cluster IP, and the kernel refuses every sync", func(w *world) { w.broken = errors.New("operation not permitted") }, "10.96.0.99:80", pod, Unknown, "A sync is due"},
		{"the cluster IP of a Service that is too large", func(w *world) { w.tooLarge() }, clusterIP, pod, Dropped, "Service default/web has the address and is not served there: each port has"},
		{"the cluster IP of a Service without a port", func(w *world) { w.service.Spec.Ports[0].Port = 70000 }, clusterIP, pod, Dropped, "it has no port that can be served"},
		{"the cluster IP of another proxy's Service", func(w *world) { w.service.Labels = map[string]string{service.LabelServiceProxyName: "cilium"} }, clusterIP, pod, Unknown, "Service default/web has the address and is not served there: its label"},
		{"an external IP is not allowed", func(w *world) { w.settings.ExternalIPCIDRs = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} }, "198.51.100.7:80", outside, Unknown, "this external IP is in no range of --external-ip-cidrs"},
		{"NodePorts are served at other addresses", func(w *world) {
			w.settings.NodePortAddresses.CIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		}, "192.0.2.1:30080", outside, Unknown, "NodePorts are not served (--nodeport-addresses)"},
		{"an IPv6 address on an IPv4 node", func(*world) {}, "[fd00::10]:80", "", Unknown, "does not serve IPv6"},
		{"two Services want one external IP", func(w *world) { w.others = append(w.others, w.clone("app", "10.96.0.11", "198.51.100.7")) }, "default/web", outside, Unknown, "is not served for Service default/web:http: Service default/app:http has it."},
		{"external IPs are switched off", func(w *world) { w.settings.IgnoreExternalIPs = true }, "198.51.100.7:80", outside, Unknown, "has the address and is not served there: external IPs are switched off"},
		{"an external IP is the API server's", func(w *world) { w.api("198.51.100.7:80") }, "198.51.100.7:80", "192.0.2.1", Unknown, "does not go to the Service: an API server is at 198.51.100.7:80, and this node connects to it directly."},
		{"an external IP is the API server's, from a Pod", func(w *world) { w.api("198.51.100.7:80") }, "198.51.100.7:80", pod, Served, "one of 3"},
		{"an external IP is the API server's, at another port", func(w *world) { w.api("198.51.100.7:6443") }, "198.51.100.7:80", "192.0.2.1", Served, "one of 3"},
		{"an external IP is the API server's, from a bridge of Pods", func(w *world) { w.api("198.51.100.7:80") }, "198.51.100.7:80", "10.244.1.1", Unknown, "from this node's 10.244.1.1 does not go to the Service"},
		{"a NodePort is the API server's", func(w *world) { w.api("192.0.2.1:30080") }, "192.0.2.1:30080", "192.0.2.1", Unknown, "processes of this node connect to it past the Service"},
		{"a NodePort is the API server's, at another address", func(w *world) { w.api("192.0.2.1:30080") }, "10.244.1.1:30080", "192.0.2.1", Served, "one of 3"},
		{"an external IP is the API server's, in ipvs mode, from a Pod", func(w *world) { w.api("198.51.100.7:80"); w.traits = asIPVS }, "198.51.100.7:80", pod, Unknown, "from Pod 10.244.1.12 does not go to the Service: an API server has the address 198.51.100.7, and mode test leaves packets to it alone."},
		{"an external IP is the API server's, in ipvs mode, from outside", func(w *world) { w.api("198.51.100.7:6443"); w.traits = asIPVS }, "198.51.100.7:80", outside, Unknown, "an API server has the address"},
		{"an external IP is the API server's, in ipvs mode, from the node", func(w *world) { w.api("198.51.100.7:80"); w.traits = asIPVS }, "198.51.100.7:80", "192.0.2.1", Unknown, "this node connects to it directly"},
		{"an external IP is the API server's, in ipvs mode, from the node to another port", func(w *world) { w.api("198.51.100.7:6443"); w.traits = asIPVS }, "198.51.100.7:80", "192.0.2.1", Served, "one of 3"},
		{"an external IP is the API server's, in ipvs mode, from the node to another port, and no endpoint", func(w *world) {
			w.api("198.51.100.7:6443")
			w.traits, w.slice.Endpoints = asIPVS, nil
		}, "198.51.100.7:80", "192.0.2.1", Unknown, "an API server has the address"},
		{"an external IP is the API server's, in ipvs mode, and source ranges exclude the client", func(w *world) {
			w.api("203.0.113.5:6443")
			w.traits, w.service.Spec.LoadBalancerSourceRanges = asIPVS, []string{"198.18.0.0/15"}
		}, "203.0.113.5:80", outside, Unknown, "an API server has the address"},
		{"an external IP is the API server's and this node's, in ipvs mode", func(w *world) {
			w.api("192.0.2.1:6443")
			w.traits, w.service.Spec.ExternalIPs = asIPVS, []string{"192.0.2.1"}
		}, "192.0.2.1:80", outside, Served, "one of 3"},
		{"an external IP is the API server's, in ipvs mode, by the Service", func(w *world) { w.api("198.51.100.7:6443"); w.traits = asIPVS }, "default/web", "", Unknown, "from a Pod of this node or a client outside of this node to 198.51.100.7:80/tcp does not go to the Service"},
		{"the load balancer answers itself", func(w *world) {
			w.service.Status.LoadBalancer.Ingress[0].IPMode = ptr.To(corev1.LoadBalancerIPModeProxy)
		}, "203.0.113.5:80", outside, Unknown, "the load balancer itself answers there (ipMode: Proxy)"},
		{"the port of a health check", func(w *world) { w.local(); w.service.Spec.HealthCheckNodePort = 31000 }, "192.0.2.1:31000", outside, Unknown, "health check port of Service default/web"},
		{"SCTP in userspace mode", func(w *world) { w.protocol(corev1.ProtocolSCTP); w.traits = asUserspace }, "10.96.0.10:80/sctp", pod, Refused, "is refused: mode test does not serve SCTP."},
		{"SCTP in userspace mode, policy Local without a local endpoint", func(w *world) {
			w.protocol(corev1.ProtocolSCTP)
			w.local()
			w.remote()
			w.traits = asUserspace
		}, "192.0.2.1:30080/sctp", outside, Refused, "does not serve SCTP"},
		{"on loopback, nftables", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8") }, "127.0.0.1:30080", "", Served, "from a process of this node goes to one of 3"},
		{"on loopback, nftables, UDP", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8"); w.protocol(corev1.ProtocolUDP) }, "127.0.0.1:30080/udp", "", Refused, "on loopback, mode test serves TCP alone."},
		{"on loopback, userspace, UDP", func(w *world) { w.loopback(asUserspace, "127.0.0.0/8"); w.protocol(corev1.ProtocolUDP) }, "127.0.0.1:30080/udp", "", Served, "one of 3"},
		{"on loopback, nftables, policy Local", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8"); w.local() }, "127.0.0.1:30080", "127.0.0.1", Served, "this node's 127.0.0.1 goes to one of 2"},
		{"on loopback, nftables, policy Local without a local endpoint", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8"); w.local(); w.remote() }, "127.0.0.1:30080", "127.0.0.1", Refused, "is refused: a connection on loopback counts as from outside. There the traffic policy is Local, and no usable endpoint is on this node; 3 are not on this node."},
		{"on loopback, userspace, policy Local without a local endpoint", func(w *world) { w.loopback(asUserspace, "127.0.0.0/8"); w.local(); w.remote() }, "127.0.0.1:30080", "127.0.0.1", Served, "one of 3"},
		{"on loopback, another program has the port", func(w *world) {
			w.loopback(asNFTables, "127.0.0.0/8")
			w.problem = "NodePort 30080 is not served on loopback"
		}, "127.0.0.1:30080", "", Unknown, "does not go to the Service: NodePort 30080 is not served on loopback."},
		{"on loopback, another address, nftables", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8") }, "127.0.0.2:30080", "", Unknown, "an address of this node at which NodePorts are not served"},
		{"on loopback, another address, iptables", func(w *world) { w.loopback(asIPTables, "0.0.0.0/0") }, "127.0.0.2:30080", "", Served, "one of 3"},
		{"on loopback, another address, iptables with a list", func(w *world) { w.loopback(asIPTables, "127.0.0.0/8") }, "127.0.0.2:30080", "", Unknown, "NodePorts are not served"},
		{"on loopback, not by name", func(w *world) { w.loopback(asNFTables, "0.0.0.0/0") }, "127.0.0.1:30080", "", Unknown, "NodePorts are not served"},
		{"on loopback, from a Pod", func(w *world) { w.loopback(asNFTables, "127.0.0.0/8") }, "127.0.0.1:30080", pod, Unknown, "10.244.1.12 is not an address of this node, and only processes of this node reach 127.0.0.1."},
		{"not all objects are read", func(w *world) { w.halfRead = true }, "default/web", "", Unknown, "signalbox has not read all objects yet"},
		{"not all objects are read, at an address", func(w *world) { w.halfRead = true }, clusterIP, pod, Unknown, "what the kernel had before still serves."},
		{"a bad port in the object", func(w *world) { w.service.Spec.Ports[0].Port = 70000 }, "default/web", "", Unknown, "70000 is not a port"},
	} {
		t.Run(strings.ReplaceAll(test.fault, " ", "-"), func(t *testing.T) {
			w := newWorld(t)
			test.inject(w)
			w.start()
			if w.refused != nil {
				w.service = w.service.DeepCopy()
				w.service.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
				w.loop.Apply(w.service)
				w.loop.Apply(w.clone("good", "10.96.0.12")) // shows that the kernel is well
				if err := w.loop.SyncNow(t.Context()); err == nil {
					t.Fatal("the kernel accepts everything")
				}
			}
			a := w.ask(test.target, test.from)
			if a.Verdict != test.verdict || !strings.Contains(facts(a), test.says) {
				t.Errorf("the verdict is %s, and the facts are\n%s\nwant %s and %q", a.Verdict, facts(a), test.verdict, test.says)
			}
		})
	}
}

// facts has a line for each thing that an answer says.
func facts(a *Answer) string {
	lines := slices.Concat([]string{a.Sentence}, a.Problems, a.Doubts)
	for _, p := range a.Ports {
		for _, h := range p.Hints {
			lines = append(lines, h.Kind+" hints: "+h.Text)
		}
		for _, s := range p.Sets {
			for _, e := range s.Endpoints {
				lines = append(lines, map[bool]string{true: "used ", false: "left out "}[e.Used]+e.Address+": "+e.Text)
			}
		}
		for _, c := range p.Connections {
			lines = append(lines, c.Text, c.Sentence)
		}
	}
	return strings.Join(lines, "\n")
}

// While syncs fail, the kernel has an older form of what has changed, and the rest as
// before.
func TestFailingSyncs(t *testing.T) {
	for _, test := range []struct {
		name, service string
		err           error
		verdict       Verdict
	}{
		{"of the changes", "web", errors.New("no buffer space available"), Unknown},
		{"of the changes, asked for another Service", "good", errors.New("no buffer space available"), Refused},
		{"half-way", "good", proxier.ErrUnknownState, Unknown},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.others = append(w.others, w.clone("good", "10.96.0.12"))
			w.start()
			if a := w.ask("default/good", ""); a.Verdict != Refused {
				t.Errorf("before: %s", facts(a))
			}
			w.slice.Endpoints[0].Addresses = []string{"10.244.1.99"}
			if w.broken = test.err; w.change() == nil {
				t.Fatal("the kernel accepts the change")
			}
			a := w.ask("default/"+test.service, "")
			if a.Verdict != test.verdict || test.verdict == Unknown && !strings.Contains(facts(a), test.err.Error()) {
				t.Errorf("the verdict is %s, and the facts are\n%s", a.Verdict, facts(a))
			}
			w.broken = nil
			if err := w.change(); err != nil {
				t.Fatal(err)
			}
			if a := w.ask(clusterIP, pod); a.Verdict != Served || !a.Ports[0].Kernel.Current {
				t.Errorf("afterwards the verdict is %s, and the facts are\n%s", a.Verdict, facts(a))
			}
		})
	}
}

// An answer about a Service has all frontends, with one entry for clients that are
// treated alike.
func TestConnectionsOfAService(t *testing.T) {
	w := newWorld(t)
	w.local()
	w.start()
	var got []string
	for _, c := range w.ask("default/web", "").Ports[0].Connections {
		got = append(got, fmt.Sprintf("%s from %s masquerades %s: %d by %s", c.Address, c.From, c.Masquerade, c.Endpoints, c.Policy))
	}
	want := []string{
		"10.96.0.10:80/tcp from [pods node outside] masquerades [node outside]: 3 by Cluster",
		"198.51.100.7:80/tcp from [pods node] masquerades [node]: 3 by Cluster",
		"198.51.100.7:80/tcp from [outside] masquerades []: 2 by Local",
		"203.0.113.5:80/tcp from [pods node] masquerades [node]: 3 by Cluster",
		"203.0.113.5:80/tcp from [outside] masquerades []: 2 by Local",
		"node:30080/tcp from [pods node] masquerades [node]: 3 by Cluster",
		"node:30080/tcp from [outside] masquerades []: 2 by Local",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The rules take the address of a bridge of Pods for a Pod's, and rewrite no source.
func TestBridgeOfPods(t *testing.T) {
	w := newWorld(t)
	w.start()
	c := w.ask(clusterIP, "10.244.1.1").Ports[0].Connections[0]
	if len(c.Masquerade) > 0 || !strings.Contains(c.Sentence, "from this node's 10.244.1.1 goes to one of 3") {
		t.Errorf("%+v", c)
	}
}

func TestQuestions(t *testing.T) {
	for text, want := range map[string]string{
		"10.96.0.10:80":                      "10.96.0.10:80 tcp",
		"[fd00::a]:53/UDP":                   "[fd00::a]:53 udp",
		"localhost:30080":                    "127.0.0.1:30080 tcp",
		"default/web":                        "default/web",
		"default/web:http":                   "default/web http",
		"default/web:53/udp":                 "default/web 53 udp",
		"default/tcp":                        "default/tcp",
		"web.default.svc:80":                 "default/web 80 tcp",
		"dns.kube-system.svc.example:53/udp": "kube-system/dns 53 udp",
		"10.96.0.10":                         "error",
		"10.96.0.10:0":                       "error",
		"10.96.0.10:http":                    "error",
		"example.com:80":                     "error",
		"web":                                "error",
		"default/":                           "error",
		"a/b/c":                              "error",
		"10.96.0.10/udp":                     "error",
		"10.96.0.10/web":                     "error",
		"fd00::a:53/udp":                     "error",
		"web.default.svc/udp":                "error",
	} {
		q, err := ParseQuestion(text, "")
		got := q.Service.String()
		if q.Address.IsValid() {
			got = q.Address.String()
		} else if q.Port != "" {
			got += " " + q.Port
		}
		if q.Protocol != 0 {
			got += " " + q.Protocol.String()
		}
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q is %s (%v), want %s", text, got, err, want)
		}
	}
	for _, from := range []string{"web-0", "fd00::1"} {
		if _, err := ParseQuestion("10.96.0.10:80", from); err == nil {
			t.Errorf("a client %q of 10.96.0.10:80 is accepted", from)
		}
	}
}
