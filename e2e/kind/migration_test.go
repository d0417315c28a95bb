//go:build kind

package kind

import (
	"context"
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const kubeProxy = "kube-proxy"

// kubeProxyDaemonSet is nil in a cluster that has none.
func (s *site) kubeProxyDaemonSet() *appsv1.DaemonSet {
	s.Helper()
	ds, err := s.client.AppsV1().DaemonSets(namespace).Get(s.Context(), kubeProxy, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	s.must(err)
	return ds
}

// TestMigration goes the first way of docs/migration.md there and back under
// load: the image in kube-proxy's own DaemonSet is replaced, and nothing else.
func TestMigration(t *testing.T) {
	s := newSite(t)
	ds := s.kubeProxyDaemonSet()
	if ds == nil {
		t.Skip("the cluster has no kube-proxy to migrate from")
	}
	s.watched = kubeProxy
	s.populate()
	t.Cleanup(s.depopulate)
	original := ds.Spec.Template.Spec.Containers[0].Image
	mode := s.kubeProxyMode()
	t.Cleanup(func() { s.setImage(original) })
	s.run("kube-proxy serves", (*site).testClusterIP)
	s.run("there", func(s *site) {
		s.Cleanup(s.report)
		s.underLoad(mode, func() { s.setImage(setting("SIGNALBOX_IPTABLES_IMAGE", "signalbox-iptables:devel")) })
		s.saysMode(mode)
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("LoadBalancer with policy Local", (*site).testLoadBalancer)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
		s.noErrors()
	})
	s.run("and back", func(s *site) {
		s.underLoad(mode, func() { s.setImage(original) })
		s.saysMode(mode)
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
	})
}

// kubeProxyMode is what config.conf says, by a rule of YAML's that needs no
// parser of its own: the field is at the beginning of a line.
func (s *site) kubeProxyMode() string {
	s.Helper()
	files, err := s.client.CoreV1().ConfigMaps(namespace).Get(s.Context(), kubeProxy, metav1.GetOptions{})
	s.must(err)
	for line := range strings.Lines(files.Data["config.conf"]) {
		if mode, is := strings.CutPrefix(line, "mode:"); is {
			if mode = strings.Trim(mode, " \"\n"); mode != "" {
				return mode
			}
		}
	}
	return "iptables"
}

// setImage is kubectl set image, and waits for the rollout.
func (s *site) setImage(image string) {
	s.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":%q,"image":%q}]}}}}`, kubeProxy, image)
	ctx := context.WithoutCancel(s.Context())
	_, err := s.client.AppsV1().DaemonSets(namespace).Patch(ctx, kubeProxy, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	s.must(err)
	if s.Context().Err() == nil {
		s.rolledOut()
	}
}
