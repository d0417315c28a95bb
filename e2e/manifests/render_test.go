// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"cmp"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const (
	root  = "../../manifests"
	chart = root + "/helm/signalbox"
)

func overlay(mode string) string { return filepath.Join(root, "overlays", mode) }

// chartValues make the chart say what the overlay of a mode says.
func chartValues(mode string) map[string]any {
	return map[string]any{"mode": mode, "apiServer": "https://control-plane.invalid:6443"}
}

func kustomized(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	out, err := Kustomize(dir)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func helmed(t *testing.T, values map[string]any) []*unstructured.Unstructured {
	t.Helper()
	out, _, err := Helm(chart, values)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// normalized puts objects into one order and form: configuration files count
// by what they say, and volumes, which the API merges by name, in any order.
func normalized(t *testing.T, objects []*unstructured.Unstructured) string {
	t.Helper()
	objects = slices.Clone(objects)
	slices.SortFunc(objects, func(a, b *unstructured.Unstructured) int {
		return cmp.Compare(a.GetKind()+a.GetName(), b.GetKind()+b.GetName())
	})
	var out strings.Builder
	for _, o := range objects {
		o = o.DeepCopy()
		if o.GetKind() == "ConfigMap" {
			data := o.Object["data"].(map[string]any)
			for file, text := range data {
				var said any
				if err := yaml.Unmarshal([]byte(text.(string)), &said); err != nil {
					t.Fatalf("%s: %v", file, err)
				}
				data[file] = said
			}
		}
		sortVolumes(o.Object)
		text, err := json.MarshalIndent(o.Object, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		out.Write(append(text, '\n'))
	}
	return out.String()
}

func sortVolumes(value any) {
	switch value := value.(type) {
	case map[string]any:
		for key, below := range value {
			if list, ok := below.([]any); ok && (key == "volumes" || key == "volumeMounts") {
				slices.SortFunc(list, func(a, b any) int {
					return cmp.Compare(a.(map[string]any)["name"].(string), b.(map[string]any)["name"].(string))
				})
			}
			sortVolumes(below)
		}
	case []any:
		for _, below := range value {
			sortVolumes(below)
		}
	}
}

func TestChartAndOverlaysAreTheSame(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode, func(t *testing.T) {
			wantSame(t, kustomized(t, overlay(mode)), helmed(t, chartValues(mode)))
		})
	}
}

// wantSame shows where two renderings part.
func wantSame(t *testing.T, kustomized, helmed []*unstructured.Unstructured) {
	t.Helper()
	k, h := strings.Split(normalized(t, kustomized), "\n"), strings.Split(normalized(t, helmed), "\n")
	for i := range max(len(k), len(h)) {
		if i >= len(k) || i >= len(h) || k[i] != h[i] {
			t.Fatalf("after\n%s\nkustomize says\n%s\nand helm\n%s", lines(k, i-8, i), lines(k, i, i+5), lines(h, i, i+5))
		}
	}
}

func lines(all []string, from, to int) string {
	return strings.Join(all[min(max(0, from), len(all)):min(to, len(all))], "\n")
}

// kubeadm's ConfigMap serves as it is: none is made, and its name is in the
// DaemonSet.
func TestExistingConfigMap(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mine")
	writeKustomization(t, dir, map[string]any{
		"resources":  []string{abs(t, overlay("iptables"))},
		"components": []string{abs(t, filepath.Join(root, "components/kube-proxy-configmap"))},
	})
	values := chartValues("iptables")
	values["existingConfigMap"] = "kube-proxy"
	helm := helmed(t, values)
	wantSame(t, kustomized(t, dir), helm)
	got := normalized(t, helm)
	if strings.Contains(got, `"kind": "ConfigMap"`) || !strings.Contains(got, `"name": "kube-proxy"`) {
		t.Errorf("the DaemonSet does not use kubeadm's ConfigMap:\n%s", got)
	}
}

// With what takes over from kube-proxy every mode has the tools of iptables, and
// what their legacy variant needs.
func TestTakeover(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "mine")
			writeKustomization(t, dir, map[string]any{
				"resources":  []string{abs(t, overlay(mode))},
				"components": []string{abs(t, filepath.Join(root, "components/takeover"))},
			})
			values := chartValues(mode)
			values["takeover"] = true
			for by, objects := range map[string][]*unstructured.Unstructured{"kustomize": kustomized(t, dir), "helm": helmed(t, values)} {
				pod := daemonSet(t, objects).Spec.Template.Spec
				wantTools(t, by, pod)
				c := pod.Containers[0]
				privileged := c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
				if !privileged && !slices.Contains(c.SecurityContext.Capabilities.Add, "NET_RAW") {
					t.Errorf("%s: capabilities %+v", by, c.SecurityContext.Capabilities)
				}
			}
		})
	}
}

// wantTools wants the tools of iptables, and their lock, in each container.
func wantTools(t *testing.T, by string, pod corev1.PodSpec) {
	t.Helper()
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if !strings.HasPrefix(c.Image, "signalbox-iptables:") {
			t.Errorf("%s: %s has the image %s", by, c.Name, c.Image)
		}
		if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/run/xtables.lock" }) {
			t.Errorf("%s: %s has no lock among %+v", by, c.Name, c.VolumeMounts)
		}
	}
}

// The tools of iptables, legacy, cannot even list without their lock.
func TestIPTablesTools(t *testing.T) {
	for _, mode := range []string{"iptables", "ipvs"} {
		wantTools(t, "kustomize "+mode, daemonSet(t, kustomized(t, overlay(mode))).Spec.Template.Spec)
	}
	for _, mode := range []string{"auto", "iptables", "ipvs"} {
		wantTools(t, "helm "+mode, daemonSet(t, helmed(t, chartValues(mode))).Spec.Template.Spec)
	}
}

// The kubelet asks where health is served.
func TestChartProbes(t *testing.T) {
	values := chartValues("nftables")
	values["config"] = map[string]any{"healthzBindAddress": "[::]:20256"}
	c := daemonSet(t, helmed(t, values)).Spec.Template.Spec.Containers[0]
	if r, l := c.ReadinessProbe.HTTPGet.Port.IntValue(), c.LivenessProbe.HTTPGet.Port.IntValue(); r != 20256 || l != 20256 {
		t.Errorf("asked at %d and %d", r, l)
	}
}

// What cannot work is refused before it reaches a cluster, and the message
// names the value.
func TestChartRefuses(t *testing.T) {
	for name, change := range map[string]struct {
		key   string
		value any
		want  string
	}{
		"a mode that there is not":    {"mode", "ebpf", "mode"},
		"no API server":               {"apiServer", "", "apiServer"},
		"an API server without https": {"apiServer", "10.0.0.1:6443", "apiServer"},
		"a second mode":               {"config", map[string]any{"mode": "iptables"}, "config"},
		"a misspelt value":            {"mod", "iptables", "mod"},
		"health nowhere":              {"config", map[string]any{"healthzBindAddress": "0"}, "healthzBindAddress"},
		"health for the node alone":   {"config", map[string]any{"healthzBindAddress": "127.0.0.1:10256"}, "healthzBindAddress"},
		"metrics out of reach":        {"podMonitor", map[string]any{"enabled": true}, "metricsBindAddress"},
		"a flag of the chart's own":   {"extraArgs", []any{"--mode=ipvs"}, "extraArgs"},
		"a flag that ends signalbox":  {"extraArgs", []any{"--cleanup"}, "extraArgs"},
		"no node at a time":           {"maxSurge", 0, "maxSurge"},
		"no share of the nodes":       {"maxSurge", "0%", "maxSurge"},
		"a registry that ends in /":   {"image", map[string]any{"registry": "registry.example.com/"}, "registry"},
		"a toleration without a form": {"tolerations", []any{"all"}, "tolerations"},
	} {
		t.Run(name, func(t *testing.T) {
			values := chartValues("nftables")
			values[change.key] = change.value
			if _, _, err := Helm(chart, values); err == nil || !strings.Contains(err.Error(), change.want) {
				t.Errorf("Helm = %v, want an error about %s", err, change.want)
			}
		})
	}
}
