// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"signalbox/e2e/manifests"
)

// hangTimeout ends a test that hangs. It is longer than a slow machine needs.
const hangTimeout = 5 * time.Minute

// site is a cluster as a test sees it.
type site struct {
	*testing.T
	config  *rest.Config
	client  *kubernetes.Clientset
	applier *manifests.Applier
	// watched is the name of the DaemonSet at work, of its container and of its
	// label k8s-app.
	watched string
	// workers are the nodes that Pods run on, by name.
	workers []node
	// server and podNetwork are what kubeadm was told: the address of the API
	// server, and the Pods' ranges with a comma between.
	server, podNetwork string
	// families are those that Services can have.
	families []corev1.IPFamily
}

type node struct {
	name  string
	addrs []netip.Addr
}

func setting(name, otherwise string) string { return cmp.Or(os.Getenv(name), otherwise) }

// newSite finds out about the cluster.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{T: t, watched: "signalbox"}
	var err error
	path := os.Getenv("KUBECONFIG")
	if path == "" {
		t.Fatal("KUBECONFIG names no cluster")
	}
	s.config, err = clientcmd.BuildConfigFromFlags("", path)
	s.must(err)
	s.config.QPS = -1
	s.client, err = kubernetes.NewForConfig(s.config)
	s.must(err)
	s.applier, err = manifests.NewApplier(s.config)
	s.must(err)
	s.readKubeadm()
	s.readNodes()
	return s
}

func (s *site) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *site) readKubeadm() {
	s.Helper()
	files, err := s.client.CoreV1().ConfigMaps("kube-system").Get(s.Context(), "kubeadm-config", metav1.GetOptions{})
	s.must(err)
	var said struct {
		ControlPlaneEndpoint string
		Networking           struct{ PodSubnet, ServiceSubnet string }
	}
	s.must(yaml.Unmarshal([]byte(files.Data["ClusterConfiguration"]), &said))
	s.server, s.podNetwork = "https://"+said.ControlPlaneEndpoint, said.Networking.PodSubnet
	for _, r := range strings.Split(said.Networking.ServiceSubnet, ",") {
		p, err := netip.ParsePrefix(r)
		s.must(err)
		family := corev1.IPv6Protocol
		if p.Addr().Is4() {
			family = corev1.IPv4Protocol
		}
		s.families = append(s.families, family)
	}
}

func (s *site) readNodes() {
	s.Helper()
	nodes, err := s.client.CoreV1().Nodes().List(s.Context(), metav1.ListOptions{LabelSelector: "!node-role.kubernetes.io/control-plane"})
	s.must(err)
	for _, n := range nodes.Items {
		w := node{name: n.Name}
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil {
				w.addrs = append(w.addrs, addr)
			}
		}
		s.workers = append(s.workers, w)
	}
	slices.SortFunc(s.workers, func(a, b node) int { return cmp.Compare(a.name, b.name) })
	if len(s.workers) < 2 {
		s.Fatalf("the cluster has %d workers, and two are needed", len(s.workers))
	}
}

// addr is the node's own of a family.
func (n node) addr(t *testing.T, v6 bool) netip.Addr {
	t.Helper()
	for _, a := range n.addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	t.Fatalf("%s has no such address: %v", n.name, n.addrs)
	return netip.Addr{}
}

// eachFamily runs a test for every IP family of the cluster.
func (s *site) eachFamily(test func(s *site, v6 bool)) {
	for _, family := range s.families {
		s.Run(string(family), func(t *testing.T) {
			below := *s
			below.T = t
			test(&below, family == corev1.IPv6Protocol)
		})
	}
}

// run is a subtest on the same cluster.
func (s *site) run(name string, test func(s *site)) {
	s.Run(name, func(t *testing.T) {
		below := *s
		below.T = t
		test(&below)
	})
}

// eventually waits until check has nothing to say any more.
func (s *site) eventually(what string, check func(context.Context) error) {
	s.Helper()
	var last error
	err := wait.PollUntilContextTimeout(s.Context(), 200*time.Millisecond, hangTimeout, true, func(ctx context.Context) (bool, error) {
		last = check(ctx)
		var never *neverError
		if errors.As(last, &never) {
			return false, last
		}
		return last == nil, nil
	})
	if err != nil {
		s.Fatalf("%s: %v; last seen: %v", what, err, last)
	}
}

// neverError is a check's that waiting does not help.
type neverError struct{ error }

func never(format string, args ...any) error { return &neverError{fmt.Errorf(format, args...)} }
