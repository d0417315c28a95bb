package apiserver

import (
	"context"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"signalbox/proxier"
)

// The selectors are the API server's work, so that an object which changes its
// label appears or vanishes here like any other.
const (
	servedServices = "!" + proxier.LabelServiceProxyName
	servedSlices   = "!" + corev1.IsHeadlessService
)

// extrasWait is how long Services wait for the Node and the ServiceCIDRs to be
// listed. Without them Services are served all the same, only without
// topology and with fewer drops, until they are known.
const extrasWait = 5 * time.Second

// Source watches an API server.
type Source struct {
	client   kubernetes.Interface
	nodeName string
	log      *slog.Logger
	// Noted is told, whenever a list or a watch of a resource was asked for,
	// what keeps the API server from telling of it: nil for nothing. It is not
	// a failure that a server does not know an optional resource. May be nil;
	// set before Run.
	Noted func(resource string, err error)
}

// New returns a Source for the node of that name.
func New(client kubernetes.Interface, nodeName string, log *slog.Logger) *Source {
	return &Source{client: client, nodeName: nodeName, log: log}
}

// Run tells the sink what the API server says until ctx ends, and returns nil
// then. An API server that cannot be reached or refuses is asked again and
// again; what it said before stays with the sink.
//
// It does not wait for the reflectors, which sleep between tries without regard
// for ctx; the sink hears nothing after Run has returned.
func (s *Source) Run(ctx context.Context, sink proxier.Sink) error {
	door := &gate{sink: sink}
	defer door.shut()
	services, slices, node, cidrs := s.services(door), s.endpointSlices(door), s.node(door), s.serviceCIDRs(door)
	for _, r := range []*resource{services, slices, node, cidrs} {
		go r.run(ctx)
	}
	if listed(ctx, services, slices) {
		extras, cancel := context.WithTimeout(ctx, extrasWait)
		answered(extras, node, cidrs)
		cancel()
		sink.Synced()
	}
	<-ctx.Done()
	return nil
}

// listed waits until each resource was listed once.
func listed(ctx context.Context, resources ...*resource) bool {
	for _, r := range resources {
		select {
		case <-ctx.Done():
			return false
		case <-r.listed:
		}
	}
	return true
}

// answered waits until each resource was listed or refused once.
func answered(ctx context.Context, resources ...*resource) {
	for _, r := range resources {
		select {
		case <-ctx.Done():
			return
		case <-r.listed:
		case <-r.refused:
		}
	}
}

func (s *Source) services(sink proxier.Sink) *resource {
	api := s.client.CoreV1().Services(metav1.NamespaceAll)
	out := s.outcome("services", false)
	return s.resource(out, &corev1.Service{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.LabelSelector = servedServices
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", corev1.ClusterIPNone).String()
	}, out))
}

func (s *Source) endpointSlices(sink proxier.Sink) *resource {
	api := s.client.DiscoveryV1().EndpointSlices(metav1.NamespaceAll)
	out := s.outcome("endpointslices", false)
	return s.resource(out, &discoveryv1.EndpointSlice{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.LabelSelector = servedSlices
	}, out))
}

func (s *Source) node(sink proxier.Sink) *resource {
	api := s.client.CoreV1().Nodes()
	out := s.outcome("nodes", true)
	return s.resource(out, &corev1.Node{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.nodeName).String()
	}, out))
}

func (s *Source) serviceCIDRs(sink proxier.Sink) *resource {
	api := s.client.NetworkingV1().ServiceCIDRs()
	out := s.outcome("servicecidrs", true)
	return s.resource(out, &networkingv1.ServiceCIDR{}, sink, listWatch(api.List, api.Watch, func(*metav1.ListOptions) {}, out))
}

func (s *Source) outcome(resource string, optional bool) *outcome {
	return &outcome{resource: resource, optional: optional, log: s.log, now: time.Now, noted: s.Noted}
}

func (s *Source) resource(out *outcome, example object, sink proxier.Sink, lw *cache.ListWatch) *resource {
	return newResource(out.resource, example, sink, cache.ToListWatcherWithWatchListSemantics(lw, s.client), s.log)
}
