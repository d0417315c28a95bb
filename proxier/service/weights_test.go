// SPDX-License-Identifier: Apache-2.0

package service

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/proxier/plan"
)

// TestManyWeights checks that what each endpoint is compared with is bounded.
func TestManyWeights(t *testing.T) {
	var text strings.Builder
	for i := range 2 * maxWeightRules {
		fmt.Fprintf(&text, "web-%d=2,", i)
	}
	s, found := readService(&corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", Annotations: map[string]string{plan.AnnotationWeights: text.String()}},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}},
	}, nil)
	if len(s.weights) != maxWeightRules || len(found) != 1 || found[0].Field != "metadata.annotations[signalbox.dev/weights]" {
		t.Errorf("%d rules, problems %v", len(s.weights), found)
	}
}
