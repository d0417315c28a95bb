// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"sigs.k8s.io/yaml"
)

var (
	recipeSection = regexp.MustCompile(`(?m)^## (.+)$`)
	recipeBlock   = regexp.MustCompile("(?s)```yaml\n# ([^\n]+)\n(.*?)```")
)

// recipes are the blocks of docs/recipes.md with a name: section -> text.
func recipes(t *testing.T, name string) map[string]string {
	t.Helper()
	page, err := os.ReadFile("../../docs/recipes.md")
	if err != nil {
		t.Fatal(err)
	}
	out, text := map[string]string{}, string(page)
	sections := recipeSection.FindAllStringSubmatchIndex(text, -1)
	for i, at := range sections {
		end := len(text)
		if i+1 < len(sections) {
			end = sections[i+1][0]
		}
		for _, block := range recipeBlock.FindAllStringSubmatch(text[at[1]:end], -1) {
			if block[1] == name {
				out[text[at[2]:at[3]]] = block[2]
			}
		}
	}
	return out
}

// The API server accepts the chart with the values of each recipe, and the Pods have the images
// that the page tells to push.
func TestRecipeValues(t *testing.T) {
	all := recipes(t, "values.yaml")
	if got, want := slices.Sorted(maps.Keys(all)), []string{"MicroK8s", "Talos", "k3s", "kOps", "kind", "kubeadm", "kubespray"}; !slices.Equal(got, want) {
		t.Fatalf("values for %v, want %v", got, want)
	}
	for section, text := range all {
		t.Run(section, func(t *testing.T) {
			values := map[string]any{}
			if err := yaml.UnmarshalStrict([]byte(text), &values); err != nil {
				t.Fatal(err)
			}
			objects := helmed(t, values)
			apply(t, objects)
			files := &corev1.ConfigMap{}
			find(t, objects, "ConfigMap", files)
			if strictConfig(t, files.Data["config.conf"]).ClusterCIDR == "" {
				t.Error("the Pods' range is missing")
			}
			pod := daemonSet(t, objects).Spec.Template.Spec
			for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
				if !strings.HasPrefix(c.Image, "REGISTRY/signalbox") || !strings.HasSuffix(c.Image, ":VERSION") {
					t.Errorf("%s has the image %s", c.Name, c.Image)
				}
			}
		})
	}
}

// kubeadm's patch changes the image of its DaemonSet, and nothing else.
func TestRecipePatch(t *testing.T) {
	patch, err := yaml.YAMLToJSON([]byte(recipes(t, "kubeproxydaemonset+strategic.yaml")["kubeadm"]))
	if err != nil {
		t.Fatal(err)
	}
	before := &appsv1.DaemonSet{Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{Spec: corev1.PodSpec{Containers: []corev1.Container{{
		Name: "kube-proxy", Image: "registry.k8s.io/kube-proxy:v1.37.2",
		Command: []string{"/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf"},
	}}}}}}
	text, err := yaml.Marshal(before)
	if err != nil {
		t.Fatal(err)
	}
	if text, err = yaml.YAMLToJSON(text); err != nil {
		t.Fatal(err)
	}
	if text, err = strategicpatch.StrategicMergePatch(text, patch, appsv1.DaemonSet{}); err != nil {
		t.Fatal(err)
	}
	after := &appsv1.DaemonSet{}
	if err := yaml.UnmarshalStrict(text, after); err != nil {
		t.Fatal(err)
	}
	containers := after.Spec.Template.Spec.Containers
	if len(containers) != 1 || !strings.Contains(containers[0].Image, "signalbox-iptables") || !slices.Equal(containers[0].Command, before.Spec.Template.Spec.Containers[0].Command) {
		t.Errorf("%+v", containers)
	}
}
