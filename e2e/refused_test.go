// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// allowed lets a user list and watch Services and EndpointSlices, and neither
// Nodes nor ServiceCIDRs.
func (s *site) allowed(user string) {
	s.Helper()
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
		},
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: user}},
	}
	rbac := shared.Admin().RbacV1()
	_, err := rbac.ClusterRoles().Create(s.Context(), role, metav1.CreateOptions{})
	s.must(err)
	_, err = rbac.ClusterRoleBindings().Create(s.Context(), binding, metav1.CreateOptions{})
	s.must(err)
	s.Cleanup(func() {
		s.must(errors.Join(
			rbac.ClusterRoleBindings().Delete(context.Background(), user, metav1.DeleteOptions{}),
			rbac.ClusterRoles().Delete(context.Background(), user, metav1.DeleteOptions{})))
	})
}

// The API server refuses the Node: Services are served all the same, the node
// asks for no traffic of load balancers, and the log, health and metrics say so.
func TestRefusedResource(t *testing.T) {
	inEachMode(t, func(s *site) {
		const user = "half-a-proxier"
		s.allowed(user)
		kubeconfig := filepath.Join(s.TempDir(), "kubeconfig")
		s.must(shared.WriteKubeconfig(kubeconfig, s.entrance, user))
		s.start("--kubeconfig", kubeconfig)
		s.reaches(s.createService("web", []string{"pod-a"}), "pod-a")
		s.eventually("health and metrics tell", func() error {
			r, err := s.get("node1", healthURL+"/healthz")
			if err == nil && r.status != http.StatusServiceUnavailable {
				err = fmt.Errorf("/healthz: %d: %s", r.status, r.body)
			}
			m, err2 := s.get("node1", metricsURL+"/metrics")
			for series, want := range map[string]string{"nodes": "1", "services": "0"} {
				if line := fmt.Sprintf("signalbox_source_failing{resource=%q} %s\n", series, want); err2 == nil && !strings.Contains(m.body, line) {
					err2 = fmt.Errorf("no %s", line)
				}
			}
			return errors.Join(err, err2)
		})
		log, err := os.ReadFile(s.log)
		s.must(err)
		if !strings.Contains(string(log), "may not list and watch nodes; the ClusterRole system:node-proxier allows it") {
			s.Errorf("the log does not name what is refused and what allows it")
		}
	})
}
