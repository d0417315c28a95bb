// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"signalbox/e2e/manifests"
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

// newMigration is a populated site whose cluster has a kube-proxy.
func newMigration(t *testing.T) (*site, *appsv1.DaemonSet) {
	t.Helper()
	s := newSite(t)
	ds := s.kubeProxyDaemonSet()
	if ds == nil {
		t.Skip("the cluster has no kube-proxy to migrate from")
	}
	s.populate()
	t.Cleanup(s.depopulate)
	return s, ds
}

// TestMigration goes the first way of docs/migration.md there and back under
// load: the image in kube-proxy's own DaemonSet is replaced, and nothing else.
func TestMigration(t *testing.T) {
	s, ds := newMigration(t)
	s.watched = kubeProxy
	original := ds.Spec.Template.Spec.Containers[0].Image
	mode := s.kubeProxyMode()
	t.Cleanup(func() { s.setImage(original) })
	s.run("kube-proxy serves", (*site).testClusterIP)
	s.run("there", func(s *site) {
		s.Cleanup(s.report)
		s.underLoad(mode, mode, func() { s.setImage(toolsImage()) })
		s.saysMode(mode)
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("LoadBalancer with policy Local", (*site).testLoadBalancer)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
		s.noErrors()
	})
	s.run("and back", func(s *site) {
		s.underLoad(mode, mode, func() { s.setImage(original) })
		s.saysMode(mode)
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
	})
}

// TestMigrationToOwnDaemonSet goes the second way there and back under load: a
// DaemonSet of its own, in nftables mode, takes kube-proxy's place and removes
// its rules, with the component takeover.
func TestMigrationToOwnDaemonSet(t *testing.T) {
	s, _ := newMigration(t)
	before := s.kubeProxyMode()
	if before != "iptables" {
		t.Skip("the component takeover is about rules of iptables")
	}
	objects, err := manifests.Kustomize(s.takeover())
	s.must(err)
	t.Cleanup(func() { // on the way of a failure
		ctx := context.WithoutCancel(s.Context())
		s.must(s.applier.Delete(ctx, objects))
		s.must(s.wake(ctx))
	})
	s.run("there", func(s *site) {
		s.Cleanup(s.report)
		s.underLoad(before, before, func() {
			s.must(s.asleep(s.Context()))
			s.must(s.applier.Apply(s.Context(), objects))
			s.rolledOut()
		})
		s.saysMode("nftables")
		s.run("kube-proxy's rules are gone", func(s *site) {
			for _, n := range s.workers {
				if got := s.serviceChains(n.name); got != 0 {
					s.Errorf("chains of Services in iptables on %s: %d", n.name, got)
				}
			}
		})
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("LoadBalancer with policy Local", (*site).testLoadBalancer)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
		s.noErrors()
	})
	s.run("and back", func(s *site) {
		s.underLoad(before, before, func() {
			s.must(s.applier.Delete(s.Context(), objects))
			s.must(s.wake(s.Context()))
			s.watched = kubeProxy
			s.rolledOut()
			for _, n := range s.workers {
				// Its Pod counts as ready before it has written a rule.
				s.eventually("kube-proxy's rules on "+n.name, func(context.Context) error {
					if s.serviceChains(n.name) == 0 {
						return errors.New("none")
					}
					return nil
				})
				s.onNode(n.name, "signalbox", "cleanup")
			}
		})
		s.saysMode(before)
		s.run("ClusterIP", (*site).testClusterIP)
		s.run("NodePort", (*site).testNodePort)
		s.run("an endpoint comes and goes", (*site).testEndpointChange)
	})
}

// serviceChains counts the chains of Services on a node, in both variants of iptables and both
// families. The image has no shell.
func (s *site) serviceChains(node string) (count int) {
	s.Helper()
	for _, save := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		rules := s.onNode(node, save, "-t", "nat")
		count += strings.Count(rules, "\n:KUBE-SVC-") + strings.Count(rules, "\n:KUBE-SVL-")
	}
	return count
}

// takeover writes the kustomization of docs/migration.md.
func (s *site) takeover() string {
	s.Helper()
	dir := s.TempDir()
	at := func(what string) string {
		path, err := filepath.Abs(filepath.Join(folder, what))
		s.must(err)
		path, err = filepath.Rel(dir, path)
		s.must(err)
		return path
	}
	s.writeYAML(filepath.Join(dir, "kustomization.yaml"), map[string]any{
		"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
		"resources":  []string{at("overlays/nftables")},
		"components": []string{at("components/kube-proxy-configmap"), at("components/takeover")},
		"images":     []any{image("signalbox-iptables", toolsImage())},
	})
	return dir
}

// asleep has kube-proxy run on no node, and waits until it does not.
func (s *site) asleep(ctx context.Context) error {
	if err := s.patchKubeProxy(ctx, types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"nodeSelector":{"kube-proxy":"asleep"}}}}}`); err != nil {
		return err
	}
	s.eventually("the end of kube-proxy's Pods", func(ctx context.Context) error {
		pods, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "k8s-app=" + kubeProxy})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("there are %d", len(pods.Items))
		}
		return err
	})
	return nil
}

// wake undoes asleep; that it has been undone is no error.
func (s *site) wake(ctx context.Context) error {
	err := s.patchKubeProxy(ctx, types.JSONPatchType, `[{"op":"remove","path":"/spec/template/spec/nodeSelector/kube-proxy"}]`)
	if apierrors.IsInvalid(err) {
		return nil
	}
	return err
}

func (s *site) patchKubeProxy(ctx context.Context, kind types.PatchType, patch string) error {
	_, err := s.client.AppsV1().DaemonSets(namespace).Patch(ctx, kubeProxy, kind, []byte(patch), metav1.PatchOptions{})
	return err
}

// onNode runs a command of the image with the tools with all rights on a node, as
// kubectl debug does, and returns what it printed.
func (s *site) onNode(node string, command ...string) string {
	s.Helper()
	pods := s.client.CoreV1().Pods(playground)
	pod, err := pods.Create(s.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "on-node-"},
		Spec: corev1.PodSpec{
			NodeName: node, HostNetwork: true, RestartPolicy: corev1.RestartPolicyNever,
			Containers: []corev1.Container{{
				Name: "command", Image: toolsImage(), Command: command,
				SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)},
			}},
		},
	}, metav1.CreateOptions{})
	s.must(err)
	s.eventually(fmt.Sprintf("the end of %q on %s", command, node), func(ctx context.Context) error {
		p, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		switch {
		case err != nil:
			return err
		case p.Status.Phase == corev1.PodFailed:
			return never("it failed: %s", s.printed(ctx, playground, pod.Name, "command"))
		case p.Status.Phase != corev1.PodSucceeded:
			return fmt.Errorf("it is %s", p.Status.Phase)
		}
		return nil
	})
	return s.printed(s.Context(), playground, pod.Name, "command")
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
