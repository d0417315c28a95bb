// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"context"
	"maps"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
)

const (
	namespace = "kube-system"
	account   = "system:serviceaccount:kube-system:signalbox"
)

// apply wants every object to be accepted, and removes them when the test ends.
func apply(t *testing.T, objects []*unstructured.Unstructured) {
	t.Helper()
	config, err := shared.Config("admin", "system:masters")
	if err != nil {
		t.Fatal(err)
	}
	a, err := NewApplier(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Delete(context.WithoutCancel(t.Context()), objects); err != nil {
			t.Error(err)
		}
	})
	if err := a.Apply(t.Context(), objects); err != nil {
		t.Fatal(err)
	}
}

func daemonSet(t *testing.T, objects []*unstructured.Unstructured) *appsv1.DaemonSet {
	t.Helper()
	ds := &appsv1.DaemonSet{}
	find(t, objects, "DaemonSet", ds)
	return ds
}

// find puts the one object of a kind into out.
func find(t *testing.T, objects []*unstructured.Unstructured, kind string, out any) {
	t.Helper()
	i := slices.IndexFunc(objects, func(o *unstructured.Unstructured) bool { return o.GetKind() == kind })
	if i < 0 {
		t.Fatalf("there is no %s", kind)
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(objects[i].Object, out); err != nil {
		t.Fatal(err)
	}
}

// The API server takes what is rendered, and the Pods that the DaemonSet's
// controller would make of it.
func TestAPIServerAccepts(t *testing.T) {
	for _, mode := range Modes {
		for name, objects := range map[string][]*unstructured.Unstructured{
			"kustomize": kustomized(t, overlay(mode)),
			"helm":      helmed(t, chartValues(mode)),
		} {
			t.Run(mode+"/"+name, func(t *testing.T) {
				apply(t, objects)
				ds := daemonSet(t, objects)
				pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "signalbox-", Labels: ds.Spec.Template.Labels}, Spec: ds.Spec.Template.Spec}
				dryRun := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict}
				made, err := shared.Admin().CoreV1().Pods(namespace).Create(t.Context(), pod, dryRun)
				if err != nil {
					t.Fatal(err)
				}
				if made.Spec.Priority == nil || *made.Spec.Priority < 2_000_000_000 {
					t.Errorf("priority %v, want that of what a node cannot do without", made.Spec.Priority)
				}
			})
		}
	}
}

// A proxy on every node is worth attacking: it may do what kube-proxy may, and
// nothing else. The role is the API server's own.
func TestRights(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode, func(t *testing.T) {
			objects := kustomized(t, overlay(mode))
			for _, o := range objects {
				if !slices.Contains([]string{"ServiceAccount", "ClusterRoleBinding", "ConfigMap", "DaemonSet"}, o.GetKind()) {
					t.Errorf("there is a %s %s", o.GetKind(), o.GetName())
				}
			}
			binding := &rbacv1.ClusterRoleBinding{}
			find(t, objects, "ClusterRoleBinding", binding)
			role, err := shared.Admin().RbacV1().ClusterRoles().Get(t.Context(), "system:node-proxier", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if binding.RoleRef.Name != role.Name {
				t.Errorf("bound to %s", binding.RoleRef.Name)
			}
			apply(t, objects)
			got, nobody := rights(t, account), rights(t, "system:serviceaccount:kube-system:nobody")
			maps.DeleteFunc(got, func(right string, _ bool) bool { return nobody[right] })
			want := map[string]bool{}
			for _, rule := range role.Rules {
				for _, group := range rule.APIGroups {
					for _, resource := range rule.Resources {
						for _, verb := range rule.Verbs {
							want[verb+" "+group+"/"+resource] = true
						}
					}
				}
			}
			if !maps.Equal(got, want) {
				t.Errorf("its rights are %v, kube-proxy's %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
			}
		})
	}
}

// rights are what the API server says that a service account may do in
// kube-system.
func rights(t *testing.T, user string) map[string]bool {
	t.Helper()
	config, err := shared.Config("admin", "system:masters")
	if err != nil {
		t.Fatal(err)
	}
	config.Impersonate.UserName = user
	config.Impersonate.Groups = []string{"system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}
	review, err = client.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(), review, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, rule := range review.Status.ResourceRules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					all[verb+" "+group+"/"+resource] = true
				}
			}
		}
	}
	return all
}

// Between them the containers have no right that their mode was not seen to
// need: docs/deploying.md says what for.
func TestPrivileges(t *testing.T) {
	for mode, want := range map[string][]corev1.Capability{
		"nftables":  {"NET_ADMIN"},
		"iptables":  {"NET_ADMIN", "NET_RAW"},
		"userspace": {"NET_ADMIN"},
		"ipvs":      nil, // privileged
	} {
		t.Run(mode, func(t *testing.T) {
			spec := daemonSet(t, kustomized(t, overlay(mode))).Spec.Template.Spec
			if len(spec.Containers) != 1 {
				t.Fatalf("%d containers", len(spec.Containers))
			}
			c := spec.Containers[0].SecurityContext
			if c.ReadOnlyRootFilesystem == nil || !*c.ReadOnlyRootFilesystem {
				t.Error("its root file system can be written")
			}
			if privileged := c.Privileged != nil && *c.Privileged; privileged != (want == nil) {
				t.Errorf("privileged: %v", privileged)
			}
			if want == nil {
				return
			}
			if !slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(c.Capabilities.Add, want) {
				t.Errorf("capabilities %+v, want %v and no others", c.Capabilities, want)
			}
			if c.AllowPrivilegeEscalation == nil || *c.AllowPrivilegeEscalation {
				t.Error("it may gain rights")
			}
		})
	}
}
