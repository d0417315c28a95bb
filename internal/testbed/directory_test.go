// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

func TestPublishReplacesWhole(t *testing.T) {
	d, err := NewDirectory(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"10.96.0.10", "10.96.0.11"} {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{ClusterIP: address}}
		if err := d.Publish("web.yaml", svc); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(d.Path, "web.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		var got corev1.Service
		if err := yaml.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		if got.Kind != "Service" || got.APIVersion != "v1" || got.Name != "web" || got.Spec.ClusterIP != address {
			t.Errorf("the file has\n%s", text)
		}
	}
	for path, want := range map[string]int{d.staging: 0, d.Path: 1} {
		left, err := os.ReadDir(path)
		if err != nil || len(left) != want {
			t.Errorf("%s has %v (%v), want %d files", path, left, err, want)
		}
	}
}
