// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"os"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/cluster"
	"signalbox/internal/testbed"
)

// changeUnseen changes, deletes and creates Services while signalbox cannot
// see it, and returns the check of what must hold once it can.
func changeUnseen(s *site) (caughtUp func()) {
	s.Helper()
	moved := s.createService("moved", []string{"pod-a"})
	deleted := s.createService("deleted", []string{"pod-a"})
	s.reaches(moved, "pod-a")
	s.reaches(deleted, "pod-a")
	s.relay.Cut()
	s.setEndpoints("moved", []string{"pod-b"})
	s.deleteService("deleted")
	created := s.createService("created", []string{"pod-c"})
	// What was last known goes on being served.
	s.reaches(moved, "pod-a")
	s.reaches(deleted, "pod-a")
	return func() {
		s.Helper()
		s.reaches(moved, "pod-b")
		s.unreachable(deleted)
		s.reaches(created, "pod-c")
	}
}

// A connection that breaks is made again, and nothing is missed.
func TestConnectionCut(t *testing.T) {
	inEachMode(t, func(s *site) {
		steady := s.createService("steady", []string{"pod-a", "pod-c"}, asNodePort)
		s.start()
		s.reaches(steady, "pod-a", "pod-c")
		traffic := s.traffic(steady)
		caughtUp := changeUnseen(s)
		s.must(s.relay.Restore())
		caughtUp()
		traffic.end(s)
	})
}

// The API server restarts, and objects change before signalbox reaches it
// again. A fresh API server cannot say what happened before it came up, so
// signalbox has to list everything anew and notice what is missing.
func TestAPIServerRestart(t *testing.T) {
	inEachMode(t, func(s *site) {
		steady := s.createService("steady", []string{"pod-a", "pod-c"}, asNodePort)
		s.start()
		s.reaches(steady, "pod-a", "pod-c")
		traffic := s.traffic(steady)
		caughtUp := changeUnseen(s)
		s.must(shared.StopAPIServer())
		s.must(shared.StartAPIServer(s.Context()))
		s.must(s.relay.Restore())
		caughtUp()
		traffic.end(s)
	})
}

// While the connection was away etcd compacted its history: the API server
// answers the watch with 410 Gone. Here it has no cache of its own that could
// hide that.
func TestWatchExpires(t *testing.T) {
	dir, err := cluster.MakeDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	options := testbed.ClusterOptions()
	options.Dir = dir
	options.Uncached = []string{"services", "endpointslices.discovery.k8s.io"}
	c, err := cluster.Start(t.Context(), binaries, options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, c, mode)
			steady := s.createService("steady", []string{"pod-a", "pod-c"}, asNodePort)
			s.start()
			s.reaches(steady, "pod-a", "pod-c")
			traffic := s.traffic(steady)
			before := resourceVersion(s)
			caughtUp := changeUnseen(s)
			s.must(c.Compact(s.Context(), resourceVersion(s)))
			checkExpired(s, before)
			s.must(s.relay.Restore())
			caughtUp()
			traffic.end(s)
		})
	}
}

func resourceVersion(s *site) string {
	s.Helper()
	list, err := s.client.CoreV1().Services("").List(s.Context(), metav1.ListOptions{})
	s.must(err)
	return list.ResourceVersion
}

// checkExpired wants a watch that goes on from the version to fail, as that of
// signalbox will.
func checkExpired(s *site, version string) {
	s.Helper()
	w, err := s.client.CoreV1().Services("").Watch(s.Context(), metav1.ListOptions{ResourceVersion: version})
	s.must(err)
	defer w.Stop()
	if e := <-w.ResultChan(); !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
		s.Fatalf("a watch from version %s says %+v, want that it expired", version, e)
	}
}

// Pods reach the API server through signalbox, at the Service that it makes for
// itself.
func TestKubernetesService(t *testing.T) {
	inEachMode(t, func(s *site) {
		s.start()
		svc, err := s.client.CoreV1().Services("default").Get(s.Context(), "kubernetes", metav1.GetOptions{})
		s.must(err)
		for _, from := range []string{"pod-x", "node1"} {
			s.eventually("the API server from "+from, func() error {
				return s.asksAPIServer(from, netip.AddrPortFrom(clusterIP(svc, false), 443))
			})
		}
	})
}
