// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// A chartCase is values beside those that every installation has, and what they change.
type chartCase struct {
	values map[string]any
	kinds  []string // beside those that every installation has
	check  func(t *testing.T, pod corev1.PodTemplateSpec)
}

var chartCases = map[string]chartCase{
	"auto": {values: map[string]any{"mode": "auto"}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		c := pod.Spec.Containers[0]
		if !strings.HasPrefix(c.Image, "signalbox-iptables:") || !slices.Contains(c.SecurityContext.Capabilities.Add, "NET_RAW") {
			t.Errorf("iptables would not work: image %s, %+v", c.Image, c.SecurityContext.Capabilities)
		}
	}},
	"image": {values: map[string]any{
		"image":            map[string]any{"repository": "registry.example.com/sb", "tag": "v1", "pullPolicy": "Always"},
		"imagePullSecrets": []any{map[string]any{"name": "registry"}},
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
			if c.Image != "registry.example.com/sb:v1" || c.ImagePullPolicy != corev1.PullAlways {
				t.Errorf("%s has %s, %s", c.Name, c.Image, c.ImagePullPolicy)
			}
		}
		if len(pod.Spec.ImagePullSecrets) != 1 {
			t.Errorf("secrets %v", pod.Spec.ImagePullSecrets)
		}
	}},
	"registry": {values: map[string]any{
		"mode": "ipvs", "image": map[string]any{"registry": "registry.example.com/team", "tag": "v1"},
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
			if c.Image != "registry.example.com/team/signalbox-iptables:v1" {
				t.Errorf("%s has %s", c.Name, c.Image)
			}
		}
	}},
	"flags and environment": {values: map[string]any{
		"extraArgs": []any{"-v=2", "--max-cpu=5%"},
		"extraEnv":  []any{map[string]any{"name": "GOMEMLIMIT", "value": "200MiB"}},
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
			if _, err := understood(strings.NewReplacer(" --config=", ""), slices.DeleteFunc(slices.Clone(c.Args), isConfig)); err != nil {
				t.Errorf("%s %q: %v", c.Name, c.Args, err)
			}
			if c.Args[len(c.Args)-1] != "--max-cpu=5%" || c.Env[len(c.Env)-1].Name != "GOMEMLIMIT" {
				t.Errorf("%s has the arguments %q and %v", c.Name, c.Args, c.Env)
			}
		}
	}},
	"scheduling": {values: map[string]any{
		"nodeSelector": map[string]any{"pool": "edge"},
		"tolerations":  []any{map[string]any{"key": "edge", "operator": "Exists", "effect": "NoSchedule"}},
		"affinity": map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{
			"nodeSelectorTerms": []any{map[string]any{"matchExpressions": []any{map[string]any{"key": "arch", "operator": "In", "values": []any{"amd64"}}}}},
		}}},
		"priorityClassName": "system-cluster-critical",
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		s := pod.Spec
		if s.NodeSelector["pool"] != "edge" || len(s.Tolerations) != 1 || s.Tolerations[0].Key != "edge" ||
			s.Affinity == nil || s.Affinity.NodeAffinity == nil || s.PriorityClassName != "system-cluster-critical" {
			t.Errorf("%+v", s)
		}
	}},
	"no scheduling": {values: map[string]any{"nodeSelector": nil, "tolerations": []any{}, "priorityClassName": ""}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		if s := pod.Spec; len(s.NodeSelector)+len(s.Tolerations) > 0 || s.PriorityClassName != "" {
			t.Errorf("%+v", s)
		}
	}},
	"labels and annotations": {values: map[string]any{
		"podAnnotations": map[string]any{"example.com/team": "net"}, "podLabels": map[string]any{"tier": "node", "k8s-app": "other"},
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		if pod.Annotations["example.com/team"] != "net" || pod.Labels["tier"] != "node" || pod.Labels["k8s-app"] != "signalbox" {
			t.Errorf("labels %v, annotations %v", pod.Labels, pod.Annotations)
		}
	}},
	"resources and surge": {values: map[string]any{
		"resources": map[string]any{"limits": map[string]any{"memory": "256Mi"}}, "maxSurge": 1,
	}, check: func(t *testing.T, pod corev1.PodTemplateSpec) {
		if m := pod.Spec.Containers[0].Resources.Limits.Memory(); m.String() != "256Mi" {
			t.Errorf("memory %s", m)
		}
	}},
	// As in a values.yaml whose lines below these keys are comments.
	"empty":                            {values: map[string]any{"config": nil, "image": nil, "podMonitor": nil, "prometheusRule": nil, "dashboard": nil, "resources": nil}},
	"kubeadm's ConfigMap and takeover": {values: map[string]any{"existingConfigMap": "kube-proxy", "apiServer": "", "takeover": true}},
	"dashboard": {
		values: map[string]any{"dashboard": map[string]any{"enabled": true, "labels": map[string]any{"folder": "net"}}},
		kinds:  []string{"ConfigMap"},
	},
	"Prometheus Operator": {
		values: map[string]any{
			"config":         map[string]any{"metricsBindAddress": "[::]:20249"},
			"podMonitor":     map[string]any{"enabled": true, "interval": "15s", "job": "kube-proxy", "labels": map[string]any{"release": "p"}},
			"prometheusRule": map[string]any{"enabled": true, "labels": map[string]any{"release": "p"}},
		},
		kinds: []string{"PodMonitor", "PrometheusRule"},
	},
}

func isConfig(arg string) bool { return strings.HasPrefix(arg, "--config=") }

// The API server accepts what each set of values renders, and the Pod of `helm test`.
func TestChartValues(t *testing.T) {
	for name, c := range chartCases {
		t.Run(name, func(t *testing.T) {
			values := chartValues("nftables")
			for key, value := range c.values {
				values[key] = value
			}
			installed, hooks, err := Helm(chart, values)
			if err != nil {
				t.Fatal(err)
			}
			wantKinds(t, installed, values, c.kinds)
			if len(hooks) != 1 || hooks[0].GetKind() != "Pod" {
				t.Errorf("hooks %v, want the Pod of helm test", hooks)
			}
			apply(t, append(slices.DeleteFunc(installed, ofPrometheus), hooks...))
			if c.check != nil {
				c.check(t, daemonSet(t, installed).Spec.Template)
			}
		})
	}
}

func wantKinds(t *testing.T, objects []*unstructured.Unstructured, values map[string]any, more []string) {
	t.Helper()
	want := append([]string{"ServiceAccount", "ClusterRoleBinding", "DaemonSet"}, more...)
	if values["existingConfigMap"] == nil {
		want = append(want, "ConfigMap")
	}
	var got []string
	for _, o := range objects {
		got = append(got, o.GetKind())
	}
	slices.Sort(got)
	if slices.Sort(want); !slices.Equal(got, want) {
		t.Errorf("kinds %v, want %v", got, want)
	}
}

// monitoring is a file of manifests/monitoring.
func monitoring(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "monitoring", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func ofPrometheus(o *unstructured.Unstructured) bool {
	return o.GroupVersionKind().Group == monitoringv1.SchemeGroupVersion.Group
}

// strictly decodes an object into the type of its API; an unknown field is an error.
func strictly(t *testing.T, o *unstructured.Unstructured, into any) {
	t.Helper()
	text, err := yaml.Marshal(o.Object)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(text, into); err != nil {
		t.Errorf("%s: %v", o.GetKind(), err)
	}
}

// Prometheus Operator's own types have each field. Rules and dashboard are those of
// manifests/monitoring, which TestAlerts and TestDashboard check.
func TestChartMonitoring(t *testing.T) {
	values := chartValues("nftables")
	for key, value := range chartCases["Prometheus Operator"].values {
		values[key] = value
	}
	values["dashboard"] = map[string]any{"enabled": true}
	monitor, rules, dashboard := &monitoringv1.PodMonitor{}, &monitoringv1.PrometheusRule{}, &corev1.ConfigMap{}
	for _, o := range helmed(t, values) {
		switch o.GetKind() {
		case "PodMonitor":
			strictly(t, o, monitor)
		case "PrometheusRule":
			strictly(t, o, rules)
		case "ConfigMap":
			if o.GetName() == "signalbox-dashboard" {
				strictly(t, o, dashboard)
			}
		}
	}
	if len(monitor.Spec.PodMetricsEndpoints) != 1 || monitor.Labels["release"] != "p" {
		t.Fatalf("%+v", monitor)
	}
	for _, r := range monitor.Spec.PodMetricsEndpoints[0].RelabelConfigs {
		if r.TargetLabel == "__address__" && !strings.HasSuffix(*r.Replacement, ":20249") {
			t.Errorf("%s, where no metrics are", *r.Replacement)
		}
	}
	want := monitoringv1.PrometheusRuleSpec{}
	if err := yaml.UnmarshalStrict([]byte(monitoring(t, "alerts.yaml")), &want); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(rules.Spec, want) {
		t.Errorf("rules %+v, want those of alerts.yaml", rules.Spec)
	}
	if got := dashboard.Data["signalbox.json"]; got != monitoring(t, "dashboard.json") {
		t.Errorf("the dashboard is not that of dashboard.json:\n%s", got)
	}
}
