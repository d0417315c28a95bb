// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// store has the objects: an API server, or a directory of manifests.
type store struct {
	cluster *cluster.Cluster     // nil with a directory
	client  kubernetes.Interface // nil with a directory

	directory *testbed.Directory
}

func newStore(ctx context.Context, cfg Config, dir string) (s *store, err error) {
	s = new(store)
	if cfg.Directory {
		s.directory, err = testbed.NewDirectory(dir)
		return s, err
	}
	if s.cluster, err = testbed.StartCluster(ctx, dir, cfg.Audited, cfg.Log); err != nil {
		return nil, err
	}
	config, err := s.cluster.Config("bench", "system:masters")
	if err == nil {
		config.ContentType = "application/vnd.kubernetes.protobuf"
		s.client, err = kubernetes.NewForConfig(config)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *store) close() error {
	if s.cluster == nil {
		return nil
	}
	return s.cluster.Stop()
}

// newBed makes a lab whose node can read the objects.
func (s *store) newBed(dir string) (*testbed.Bed, error) {
	if s.cluster == nil {
		return testbed.NewFromDirectory(s.directory, netlab.Options{}, dir)
	}
	return testbed.New(s.cluster, netlab.Options{}, dir)
}

func (s *store) writeNode(ctx context.Context, n *corev1.Node) error {
	if s.client == nil {
		return s.directory.Publish(n.Name+".yaml", n)
	}
	_, err := s.client.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
	return err
}

func (s *store) writeService(ctx context.Context, svc *corev1.Service) error {
	if s.client == nil {
		return s.directory.Publish(svc.Name+".yaml", svc)
	}
	_, err := s.client.CoreV1().Services(namespace).Create(ctx, svc, metav1.CreateOptions{})
	return err
}

// writeSlice returns the slice as the store has it.
func (s *store) writeSlice(ctx context.Context, slice *discoveryv1.EndpointSlice) (*discoveryv1.EndpointSlice, error) {
	if s.client == nil {
		return slice, s.directory.Publish(slice.Name+".yaml", slice)
	}
	slices := s.client.DiscoveryV1().EndpointSlices(namespace)
	if slice.ResourceVersion == "" {
		return slices.Create(ctx, slice, metav1.CreateOptions{})
	}
	return slices.Update(ctx, slice, metav1.UpdateOptions{})
}

// createAll creates Services and EndpointSlices, of which there may be many. It sets the
// slices to what the store has.
func (s *store) createAll(ctx context.Context, services []*corev1.Service, slices []*discoveryv1.EndpointSlice) error {
	if s.client != nil {
		return s.copyAll(ctx, services, slices)
	}
	for _, svc := range services {
		if err := s.writeService(ctx, svc); err != nil {
			return err
		}
	}
	for _, slice := range slices {
		if _, err := s.writeSlice(ctx, slice); err != nil {
			return err
		}
	}
	return nil
}

// copyAll sends one object of each kind to the API server, and writes copies of what it
// stored for the others straight to etcd. Kubernetes 1.37 lists all cluster IPs for each
// Service that it creates, for a metric: the 12,000th takes 50 ms of processor time.
func (s *store) copyAll(ctx context.Context, services []*corev1.Service, slices []*discoveryv1.EndpointSlice) error {
	if err := s.copyServices(ctx, services); err != nil {
		return err
	}
	first := map[discoveryv1.AddressType]*discoveryv1.EndpointSlice{}
	w := writer{cluster: s.cluster}
	for _, slice := range slices {
		stored, ok := first[slice.AddressType]
		if !ok {
			var err error
			if stored, err = s.writeSlice(ctx, slice); err != nil {
				return err
			}
			first[slice.AddressType] = stored
			*slice = *stored
			continue
		}
		meta := stored.ObjectMeta.DeepCopy()
		meta.Name, meta.Labels = slice.Name, slice.Labels
		slice.ObjectMeta = *meta
		if err := w.write(ctx, "endpointslices/"+namespace+"/"+slice.Name, slice); err != nil {
			return err
		}
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	last := slices[len(slices)-1]
	return await(ctx, func(ctx context.Context) error {
		_, err := s.client.DiscoveryV1().EndpointSlices(namespace).Get(ctx, last.Name, metav1.GetOptions{ResourceVersion: last.ResourceVersion})
		return err
	})
}

func (s *store) copyServices(ctx context.Context, services []*corev1.Service) error {
	stored, err := s.client.CoreV1().Services(namespace).Create(ctx, services[0], metav1.CreateOptions{})
	if err != nil {
		return err
	}
	var ips []*networkingv1.IPAddress
	for _, ip := range stored.Spec.ClusterIPs {
		address, err := s.client.NetworkingV1().IPAddresses().Get(ctx, ip, metav1.GetOptions{})
		if err != nil {
			return err
		}
		ips = append(ips, address)
	}
	w, last := writer{cluster: s.cluster}, stored
	for _, svc := range services[1:] {
		last = stored.DeepCopy()
		last.Name, last.Spec.ClusterIP, last.Spec.ClusterIPs = svc.Name, svc.Spec.ClusterIP, svc.Spec.ClusterIPs
		if err := w.write(ctx, "services/specs/"+namespace+"/"+svc.Name, last); err != nil {
			return err
		}
		for i, ip := range svc.Spec.ClusterIPs {
			address := ips[i].DeepCopy()
			address.Name, address.Spec.ParentRef.Name = ip, svc.Name
			if err := w.write(ctx, "ipaddresses/"+ip, address); err != nil {
				return err
			}
		}
	}
	if err := w.flush(ctx); err != nil {
		return err
	}
	return await(ctx, func(ctx context.Context) error {
		_, err := s.client.CoreV1().Services(namespace).Get(ctx, last.Name, metav1.GetOptions{ResourceVersion: last.ResourceVersion})
		return err
	})
}

// await returns when the API server's cache has what is in etcd.
func await(ctx context.Context, cached func(context.Context) error) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, 5*time.Minute, true, func(ctx context.Context) (bool, error) {
		last = cached(ctx)
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("the API server does not have the objects that are in etcd: %w (%v)", err, last)
	}
	return nil
}

// etcdObject is an object as etcd has it.
type etcdObject interface {
	runtime.Object
	metav1.Object
}

// writer writes objects to etcd, many in one transaction.
type writer struct {
	cluster *cluster.Cluster
	objects []etcdObject
	values  map[string][]byte
}

// write writes a new object at the next flush, which sets its resource version.
func (w *writer) write(ctx context.Context, key string, object etcdObject) error {
	object.SetUID(uuid.NewUUID())
	object.SetResourceVersion("")
	value, err := runtime.Encode(encoder, object)
	if err != nil {
		return err
	}
	if w.values == nil {
		w.values = map[string][]byte{}
	}
	w.values[key] = value
	w.objects = append(w.objects, object)
	if len(w.objects) < cluster.MaxPut {
		return nil
	}
	return w.flush(ctx)
}

func (w *writer) flush(ctx context.Context) error {
	revision, err := w.cluster.Put(ctx, w.values)
	if err != nil {
		return err
	}
	for _, object := range w.objects {
		object.SetResourceVersion(revision)
	}
	w.objects, w.values = nil, nil
	return nil
}

// encoder encodes objects as the API server stores them.
var encoder = scheme.Codecs.EncoderForVersion(protobuf.NewSerializer(scheme.Scheme, scheme.Scheme),
	schema.GroupVersions{corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion, networkingv1.SchemeGroupVersion})

// listAll lists and decodes all Services and EndpointSlices, and throws them away.
func (s *store) listAll(ctx context.Context) error {
	if _, err := s.client.CoreV1().Services(namespace).List(ctx, metav1.ListOptions{ResourceVersion: "0"}); err != nil {
		return err
	}
	_, err := s.client.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	return err
}
