// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"cmp"
	"context"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"signalbox/internal/cluster"
)

func start(t *testing.T, uncached ...string) *cluster.Cluster {
	t.Helper()
	bin, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := cluster.MakeDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c, err := cluster.Start(t.Context(), bin, cluster.Options{
		Dir:          dir,
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/108")},
		Advertise:    netip.MustParseAddr("192.168.50.1"),
		Uncached:     uncached,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func dualStackService(name string) *corev1.Service {
	policy := corev1.IPFamilyPolicyRequireDualStack
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{IPFamilyPolicy: &policy, Ports: []corev1.ServicePort{{Port: 80}}},
	}
}

func TestRestartKeepsData(t *testing.T) {
	c := start(t)
	ctx := t.Context()
	version, err := c.Admin().Discovery().ServerVersion()
	if err != nil || version.GitVersion != cluster.KubeVersion {
		t.Fatalf("the server is %v (%v), want %s", version, err, cluster.KubeVersion)
	}
	made, err := c.Admin().CoreV1().Services("default").Create(ctx, dualStackService("kept"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(made.Spec.ClusterIPs) != 2 {
		t.Fatalf("cluster IPs %v, want one per family", made.Spec.ClusterIPs)
	}
	if err := c.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Admin().Discovery().ServerVersion(); err == nil {
		t.Fatal("the API server answers after it was stopped")
	}
	if err := c.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	kept, err := c.Admin().CoreV1().Services("default").Get(ctx, "kept", metav1.GetOptions{})
	if err != nil || kept.UID != made.UID {
		t.Fatalf("after the restart: %v, %v", kept, err)
	}
}

// The kubeconfig is what signalbox gets: enough for a service proxy, nothing
// beyond, and only by way of the relay.
func TestKubeconfigOfProxy(t *testing.T) {
	c := start(t)
	relay, err := cluster.NewRelay(c.Addr(), func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Cut)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := c.WriteKubeconfig(path, relay.Addr(), cluster.ProxyUser); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	client := kubernetes.NewForConfigOrDie(config)
	for _, want := range []struct {
		verb, group, resource string
		allowed               bool
	}{
		{"list", "", "services", true},
		{"watch", "discovery.k8s.io", "endpointslices", true},
		{"get", "", "nodes", true},
		{"watch", "networking.k8s.io", "servicecidrs", true},
		{"list", "", "pods", false},
		{"update", "", "services", false},
		{"patch", "", "nodes", false},
		{"get", "coordination.k8s.io", "leases", false},
	} {
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: want.verb, Group: want.group, Resource: want.resource},
		}}
		got, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got.Status.Allowed != want.allowed {
			t.Errorf("%s %s: allowed %v, want %v", want.verb, want.resource, got.Status.Allowed, want.allowed)
		}
	}
}

// A watch ends with Cut, cannot come back before Restore, and then goes on
// where it was unless that has expired.
func TestCutAndCompact(t *testing.T) {
	c := start(t, "services")
	addr := "" // the first listener's, to be the same after Restore
	relay, err := cluster.NewRelay(c.Addr(), func() (net.Listener, error) {
		l, err := net.Listen("tcp", cmp.Or(addr, "127.0.0.1:0"))
		if err == nil {
			addr = l.Addr().String()
		}
		return l, err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Cut)
	client := through(t, c, addr)
	services := c.Admin().CoreV1().Services("default")
	list, err := client.CoreV1().Services("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	from := metav1.ListOptions{ResourceVersion: list.ResourceVersion}
	w, err := client.CoreV1().Services("default").Watch(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	relay.Cut()
	for range w.ResultChan() { // ends, or the test does not
	}
	made, err := services.Create(t.Context(), dualStackService("missed"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Services("default").Watch(t.Context(), from); err == nil {
		t.Fatal("a connection came through while cut")
	}
	if err := relay.Restore(); err != nil {
		t.Fatal(err)
	}
	if e := nextEvent(t, client, from); e.Type != watch.Added {
		t.Fatalf("the watch that goes on says %v, want the missed Service", e)
	}
	if err := c.Compact(t.Context(), made.ResourceVersion); err != nil {
		t.Fatal(err)
	}
	if e := nextEvent(t, client, from); e.Type != watch.Error || !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
		t.Fatalf("the watch from before the compaction says %v, want that it expired", e)
	}
}

func through(t *testing.T, c *cluster.Cluster, addr string) *kubernetes.Clientset {
	t.Helper()
	config, err := c.Config("admin", "system:masters")
	if err != nil {
		t.Fatal(err)
	}
	config.Host = "https://" + addr
	client, err := kubernetes.NewForConfig(rest.CopyConfig(config))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func nextEvent(t *testing.T, client *kubernetes.Clientset, from metav1.ListOptions) watch.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	w, err := client.CoreV1().Services("default").Watch(ctx, from)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	e, ok := <-w.ResultChan()
	if !ok {
		t.Fatal("the watch ended without an event")
	}
	return e
}

// An API server that cannot start is not waited for, and says why.
func TestStartFails(t *testing.T) {
	bin, err := cluster.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	_, err = cluster.Start(t.Context(), bin, cluster.Options{
		Dir:          t.TempDir(),
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/31")}, // too small
		Advertise:    netip.MustParseAddr("192.168.50.1"),
	})
	if err == nil || !strings.Contains(err.Error(), "must be at least 8 IP addresses") {
		t.Fatalf("the error is %v, want one that says what the API server said", err)
	}
}

func TestRelayToNobody(t *testing.T) {
	relay, err := cluster.NewRelay("127.0.0.1:1", func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Cut()
	if resp, err := http.Get("http://" + relay.Addr()); err == nil {
		resp.Body.Close()
		t.Fatal("an answer came from nowhere")
	}
}
