// SPDX-License-Identifier: Apache-2.0

// Package apiserver is the source that watches a Kubernetes API server: Services,
// EndpointSlices, this node's Node object and ServiceCIDRs, with the selectors of
// kube-proxy and no more rights than kube-proxy has.
//
// No object is kept here. Objects go to the sink, trimmed to what a proxy reads.
// Only names and hashes stay, to find removed and changed objects after a new
// list.
package apiserver

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"signalbox/proxier/service"
)

// The API server applies the selectors. If an object's label changes, the watch
// reports the object as added or deleted.
const (
	servedServices = "!" + service.LabelServiceProxyName
	servedSlices   = "!" + corev1.IsHeadlessService
)

// extrasTimeout is how long Services wait for the Node and the ServiceCIDRs.
// Without them, there is no topology, and packets to unallocated addresses are
// not dropped.
const extrasTimeout = 5 * time.Second

// staleAfter is how long a start waits for the API server before saved objects are served.
const staleAfter = 5 * time.Second

// Source watches an API server.
type Source struct {
	client   kubernetes.Interface
	nodeName string
	log      *slog.Logger
	// OnRequest receives the end of each list and watch request. A missing
	// optional resource is no error. May be nil; set before Run.
	OnRequest func(resource string, err error)
	// StateDir, where not empty, is a directory for the last known objects. They are
	// served after a start while the API server does not answer. Set before Run.
	StateDir string
	// OnStale is called when saved objects are served, with the time of the last one,
	// and with the zero time when the API server's count again. May be nil; set before
	// Run.
	OnStale func(since time.Time)
	// OwnsState says whether this process may replace the files of another one in
	// StateDir. nil: it always may; set before Run.
	OwnsState func() bool
	// OnUnsaved is called with a line for each file in StateDir that cannot be written,
	// whenever that changes. May be nil; set before Run.
	OnUnsaved func(problems []string)
	// Known has how many objects of each resource the API server has listed. A later
	// Source of the same process gets it from an earlier one. Set before Run.
	Known map[string]int

	staleAfter  time.Duration // see staleAfter
	unsavedLock sync.Mutex
	unsaved     map[string]error // the files that cannot be written, and why
}

// New returns a Source for the node of that name.
func New(client kubernetes.Interface, nodeName string, log *slog.Logger) *Source {
	return &Source{client: client, nodeName: nodeName, log: log, staleAfter: staleAfter, Known: map[string]int{}, unsaved: map[string]error{}}
}

// Run sends the objects of the API server to the sink until ctx ends, and returns
// nil then. When requests fail, it tries again, and the sink keeps its objects.
//
// It does not wait for the reflectors: they may sleep for seconds after the end of
// ctx. Until they end, they may still call the sink.
func (s *Source) Run(ctx context.Context, sink service.Sink) error {
	services, slices, node, cidrs := s.services(sink), s.endpointSlices(sink), s.node(sink), s.serviceCIDRs(sink)
	all := []*resource{services, slices, node, cidrs}
	defer s.startSaving(ctx, all)()
	for _, r := range all {
		r.earlier = s.Known[r.name]
		defer r.remember(s.Known)
		go r.run(ctx)
	}
	s.serveSaved(ctx, sink, services, slices, node, cidrs)
	if allClosed(ctx, services.listed, slices.listed) {
		extras, cancel := context.WithTimeout(ctx, extrasTimeout)
		allClosed(extras, node.answered, cidrs.answered)
		cancel()
		sink.Synced()
	}
	<-ctx.Done()
	return nil
}

// allClosed waits for the channels, and returns false if ctx ends first.
func allClosed(ctx context.Context, channels ...<-chan struct{}) bool {
	for _, c := range channels {
		select {
		case <-ctx.Done():
			return false
		case <-c:
		}
	}
	return true
}

func (s *Source) services(sink service.Sink) *resource {
	api := s.client.CoreV1().Services(metav1.NamespaceAll)
	status := s.status("services", false)
	return s.resource(status, &corev1.Service{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.LabelSelector = servedServices
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", corev1.ClusterIPNone).String()
	}, status))
}

func (s *Source) endpointSlices(sink service.Sink) *resource {
	api := s.client.DiscoveryV1().EndpointSlices(metav1.NamespaceAll)
	status := s.status("endpointslices", false)
	return s.resource(status, &discoveryv1.EndpointSlice{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.LabelSelector = servedSlices
	}, status))
}

func (s *Source) node(sink service.Sink) *resource {
	api := s.client.CoreV1().Nodes()
	status := s.status("nodes", true)
	return s.resource(status, &corev1.Node{}, sink, listWatch(api.List, api.Watch, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.nodeName).String()
	}, status))
}

func (s *Source) serviceCIDRs(sink service.Sink) *resource {
	api := s.client.NetworkingV1().ServiceCIDRs()
	status := s.status("servicecidrs", true)
	return s.resource(status, &networkingv1.ServiceCIDR{}, sink, listWatch(api.List, api.Watch, func(*metav1.ListOptions) {}, status))
}

func (s *Source) status(resource string, optional bool) *requestStatus {
	return &requestStatus{resource: resource, optional: optional, log: s.log, now: time.Now, onRequest: s.OnRequest}
}

func (s *Source) resource(status *requestStatus, example object, sink service.Sink, lw *cache.ListWatch) *resource {
	return newResource(status.resource, example, sink, cache.ToListWatcherWithWatchListSemantics(lw, s.client), s.log)
}
