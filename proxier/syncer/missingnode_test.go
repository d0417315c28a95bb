// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A Node object that is missing is told of once, and so is its coming.
func TestMissingNode(t *testing.T) {
	node := func(name string) *corev1.Node { return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}} }
	for name, test := range map[string]struct {
		optional bool
		steps    []func(*rig)
		want     []string
	}{
		"there":                   {steps: []func(*rig){func(r *rig) { r.Apply(node("node1")) }}},
		"required":                {steps: []func(*rig){func(*rig) {}}, want: []string{"true []"}},
		"optional":                {optional: true, steps: []func(*rig){func(*rig) {}}},
		"optional, other objects": {optional: true, steps: []func(*rig){func(r *rig) { r.Apply(node("b")); r.Apply(node("a")) }}, want: []string{"true [a b]"}},
		"comes and goes": {
			steps: []func(*rig){
				func(*rig) {}, func(r *rig) { r.Apply(node("node1")) }, func(r *rig) { r.Apply(node("node1")) }, func(r *rig) { r.Delete(node("node1")) },
			},
			want: []string{"true []", "false []", "true []"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			r := newRig(t, func(o *LoopOptions) {
				o.NodeOptional = test.optional
				o.NodeMissing = func(missing bool, others []string) { got = append(got, fmt.Sprint(missing, " ", others)) }
			})
			r.Apply(node("unsynced"))
			if err := r.syncNow(); err != nil || len(got) > 0 {
				t.Fatalf("before the source has synced: %q, %v", got, err)
			}
			r.Delete(node("unsynced"))
			r.Synced()
			for _, step := range test.steps {
				step(r)
				if err := r.syncNow(); err != nil {
					t.Fatal(err)
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("told %q, want %q", got, test.want)
			}
		})
	}
}
