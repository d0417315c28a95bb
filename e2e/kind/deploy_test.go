// SPDX-License-Identifier: Apache-2.0

//go:build kind

package kind

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"signalbox/e2e/manifests"
)

const (
	namespace = "kube-system"
	folder    = "../../manifests"
)

// toolsImage is the one with the iptables tools.
func toolsImage() string { return setting("SIGNALBOX_IPTABLES_IMAGE", "signalbox-iptables:devel") }

// deploy brings every node to a mode, from the one that was there before ("" for
// what is not known), as an operator does with an overlay of his own. To remove
// iptables rules takes the image with these tools.
func (s *site) deploy(mode, before string) {
	s.Helper()
	small, tools := setting("SIGNALBOX_IMAGE", "signalbox:devel"), toolsImage()
	if before == "iptables" || before == "" {
		small = tools
	}
	objects, err := manifests.Kustomize(s.kustomization(mode, small, tools))
	s.must(err)
	s.must(s.applier.Apply(s.Context(), objects))
	s.rolledOut()
}

func (s *site) undeploy() {
	objects, err := manifests.Kustomize(filepath.Join(folder, "overlays/nftables"))
	s.must(err)
	s.must(s.applier.Delete(context.WithoutCancel(s.Context()), objects))
}

// kustomization writes that overlay: the images, the address of the API server,
// the Pods' network, and what nodes that are containers cannot have.
func (s *site) kustomization(mode, small, tools string) string {
	s.Helper()
	dir := s.TempDir()
	base, err := filepath.Abs(filepath.Join(folder, "overlays", mode))
	s.must(err)
	base, err = filepath.Rel(dir, base)
	s.must(err)
	s.writeYAML(filepath.Join(dir, "config.conf"), s.configConf())
	kubeconfig, err := os.ReadFile(filepath.Join(folder, "base/kubeconfig.conf"))
	s.must(err)
	kubeconfig = bytes.ReplaceAll(kubeconfig, []byte("https://control-plane.invalid:6443"), []byte(s.server))
	s.must(os.WriteFile(filepath.Join(dir, "kubeconfig.conf"), kubeconfig, 0o644))
	s.writeYAML(filepath.Join(dir, "kustomization.yaml"), map[string]any{
		"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace,
		"resources": []string{base},
		"images": []any{
			image("signalbox", small), image("signalbox-iptables", tools),
		},
		"configMapGenerator": []any{map[string]any{
			"name": "signalbox", "behavior": "merge", "files": []string{"config.conf", "kubeconfig.conf"},
		}},
	})
	return dir
}

func (s *site) configConf() map[string]any {
	s.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "base/config.conf"))
	s.must(err)
	var config map[string]any
	s.must(yaml.Unmarshal(text, &config))
	config["clusterCIDR"] = s.podNetwork
	// The kernel's limit is not a container's to set; kind does the same.
	config["conntrack"] = map[string]any{"maxPerCore": 0, "min": 0}
	return config
}

func image(name, full string) map[string]any {
	i := strings.LastIndex(full, ":")
	return map[string]any{"name": name, "newName": full[:i], "newTag": full[i+1:]}
}

func (s *site) writeYAML(path string, value any) {
	s.Helper()
	text, err := yaml.Marshal(value)
	s.must(err)
	s.must(os.WriteFile(path, text, 0o644))
}

// rolledOut waits until every node runs what the DaemonSet says now.
func (s *site) rolledOut() {
	s.Helper()
	s.eventually("the rollout", func(ctx context.Context) error {
		ds, err := s.client.AppsV1().DaemonSets(namespace).Get(ctx, s.watched, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if done(ds) {
			return nil
		}
		return fmt.Errorf("%+v\n%s", ds.Status, s.podStates(ctx))
	})
}

func done(ds *appsv1.DaemonSet) bool {
	st := ds.Status
	return st.ObservedGeneration == ds.Generation && st.DesiredNumberScheduled > 0 &&
		st.UpdatedNumberScheduled == st.DesiredNumberScheduled && st.NumberAvailable == st.DesiredNumberScheduled
}

func (s *site) pods(ctx context.Context) []corev1.Pod {
	pods, err := s.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "k8s-app=" + s.watched})
	if err != nil {
		return nil
	}
	return pods.Items
}

// podStates says what holds the Pods up.
func (s *site) podStates(ctx context.Context) string {
	var out strings.Builder
	for _, p := range s.pods(ctx) {
		fmt.Fprintf(&out, "%s on %s: %s\n", p.Name, p.Spec.NodeName, p.Status.Phase)
		for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
			switch {
			case c.State.Waiting != nil:
				fmt.Fprintf(&out, "  %s waits: %s %s\n", c.Name, c.State.Waiting.Reason, c.State.Waiting.Message)
			case c.State.Terminated != nil:
				fmt.Fprintf(&out, "  %s ended: %d %s\n", c.Name, c.State.Terminated.ExitCode, c.State.Terminated.Message)
			case !c.Ready:
				fmt.Fprintf(&out, "  %s is not ready\n", c.Name)
			}
			if c.RestartCount > 0 || !c.Ready {
				fmt.Fprintf(&out, "  it said: %s\n", s.said(ctx, p.Name, c.Name))
			}
		}
	}
	return out.String()
}

func (s *site) said(ctx context.Context, pod, container string) string {
	return s.printed(ctx, namespace, pod, container)
}

// printed is what a container has printed, or why that cannot be had.
func (s *site) printed(ctx context.Context, namespace, pod, container string) string {
	stream, err := s.client.CoreV1().Pods(namespace).GetLogs(pod, &corev1.PodLogOptions{Container: container}).Stream(ctx)
	if err != nil {
		return err.Error()
	}
	defer stream.Close()
	text, err := io.ReadAll(stream)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// report shows what signalbox said, where a test failed.
func (s *site) report() {
	if !s.Failed() {
		return
	}
	ctx := context.WithoutCancel(s.Context())
	for _, p := range s.pods(ctx) {
		s.Logf("%s on %s said:\n%s", p.Name, p.Spec.NodeName, s.said(ctx, p.Name, s.watched))
	}
}

// overlap is what the log may say where one Pod was killed and the next one
// came before it was gone.
const overlap = "cannot listen; trying again"

// noErrors wants signalbox to have logged nothing as an error, and not to have
// been started again by the kubelet.
func (s *site) noErrors() {
	s.Helper()
	for _, p := range s.pods(s.Context()) {
		for _, c := range p.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				s.Errorf("%s was started again %d times", p.Name, c.RestartCount)
			}
		}
		for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
			for line := range strings.Lines(s.said(s.Context(), p.Name, c.Name)) {
				if strings.Contains(line, "level=ERROR") && !strings.Contains(line, overlap) {
					s.Errorf("%s on %s: %s", c.Name, p.Spec.NodeName, line)
				}
			}
		}
	}
}

// restart makes every node start a new Pod, one after the other, as kubectl
// rollout restart does.
func (s *site) restart() {
	s.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"restarted":%q}}}}}`, metav1.Now().Format("150405.000"))
	_, err := s.client.AppsV1().DaemonSets(namespace).Patch(s.Context(), "signalbox", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	s.must(err)
	s.rolledOut()
}
