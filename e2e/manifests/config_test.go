// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/tools/clientcmd"
	kubeproxyconfigv1alpha1 "k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/config"
)

const configMount = "/var/lib/kube-proxy"

// strictConfig decodes a config.conf as kube-proxy does before it falls back on
// leniency: a field that its type has not is an error.
func strictConfig(t *testing.T, text string) *kubeproxyconfigv1alpha1.KubeProxyConfiguration {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := kubeproxyconfigv1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	out := &kubeproxyconfigv1alpha1.KubeProxyConfiguration{}
	codec := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(kubeproxyconfigv1alpha1.SchemeGroupVersion)
	if err := runtime.DecodeInto(codec, []byte(text), out); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return out
}

func eachRendering(t *testing.T, test func(t *testing.T, mode string, objects []*unstructured.Unstructured)) {
	for _, mode := range Modes {
		t.Run(mode+"/kustomize", func(t *testing.T) { test(t, mode, kustomized(t, overlay(mode))) })
		t.Run(mode+"/helm", func(t *testing.T) { test(t, mode, helmed(t, chartValues(mode))) })
	}
}

// The ConfigMap has kube-proxy's keys, and each what its name says.
func TestConfigMap(t *testing.T) {
	eachRendering(t, func(t *testing.T, mode string, objects []*unstructured.Unstructured) {
		files := &corev1.ConfigMap{}
		find(t, objects, "ConfigMap", files)
		if len(files.Data) != 2 {
			t.Errorf("the ConfigMap has %d keys", len(files.Data))
		}
		config := strictConfig(t, files.Data["config.conf"])
		if config.Mode != "" {
			t.Errorf("mode %q: the command line says it, for this file and for kubeadm's", config.Mode)
		}
		if want := configMount + "/kubeconfig.conf"; config.ClientConnection.Kubeconfig != want {
			t.Errorf("kubeconfig %q, want %q", config.ClientConnection.Kubeconfig, want)
		}
		kubeconfig, err := clientcmd.Load([]byte(files.Data["kubeconfig.conf"]))
		if err != nil {
			t.Fatal(err)
		}
		if len(kubeconfig.Clusters) != 1 || kubeconfig.Contexts[kubeconfig.CurrentContext] == nil {
			t.Errorf("kubeconfig.conf: %+v", kubeconfig)
		}
		for _, c := range kubeconfig.Clusters {
			if c.Server != "https://control-plane.invalid:6443" {
				t.Errorf("server %s", c.Server)
			}
		}
		for _, c := range daemonSet(t, objects).Spec.Template.Spec.Containers {
			mounted := false
			for _, m := range c.VolumeMounts {
				mounted = mounted || m.MountPath == configMount && m.ReadOnly
			}
			if !mounted {
				t.Errorf("%s does not find its configuration at %s", c.Name, configMount)
			}
		}
	})
}

// What a chart's user writes below config goes over what the chart says.
func TestChartConfig(t *testing.T) {
	values := chartValues("nftables")
	values["config"] = map[string]any{
		"clusterCIDR": "10.244.0.0/16", "metricsBindAddress": "0.0.0.0:10249",
		"clientConnection": map[string]any{"qps": 20}, "conntrack": map[string]any{"maxPerCore": 0},
	}
	files := &corev1.ConfigMap{}
	find(t, helmed(t, values), "ConfigMap", files)
	config := strictConfig(t, files.Data["config.conf"])
	if config.ClusterCIDR != "10.244.0.0/16" || config.MetricsBindAddress != "0.0.0.0:10249" || config.ClientConnection.QPS != 20 ||
		config.Conntrack.MaxPerCore == nil || *config.Conntrack.MaxPerCore != 0 ||
		config.ClientConnection.Kubeconfig == "" || config.OOMScoreAdj == nil || *config.OOMScoreAdj != -997 {
		t.Errorf("%+v", config)
	}
}

// signalbox itself understands the command line and the file that it names.
func TestArguments(t *testing.T) {
	eachRendering(t, func(t *testing.T, mode string, objects []*unstructured.Unstructured) {
		files := &corev1.ConfigMap{}
		find(t, objects, "ConfigMap", files)
		dir := t.TempDir()
		for name, text := range files.Data {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		spec := daemonSet(t, objects).Spec.Template.Spec
		for _, c := range append(spec.InitContainers, spec.Containers...) {
			cfg, err := understood(strings.NewReplacer(configMount, dir, "$(NODE_NAME)", "Node-1"), c.Args)
			if err != nil {
				t.Fatalf("%s %q: %v", c.Name, c.Args, err)
			}
			if cfg.Mode != mode || cfg.NodeName != "node-1" || cfg.InitOnly != (c.Name == "kernel-settings") {
				t.Errorf("%s: mode %s, node %s, init only %v", c.Name, cfg.Mode, cfg.NodeName, cfg.InitOnly)
			}
			for _, probe := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe} {
				if probe != nil && probe.HTTPGet.Port.IntValue() != int(cfg.HealthzBindAddress.Port()) {
					t.Errorf("%s answers at %v and is asked at %v", c.Name, cfg.HealthzBindAddress, probe.HTTPGet.Port)
				}
			}
		}
	})
}

// understood is what signalbox makes of a container's arguments, in which some
// words are replaced first.
func understood(replace *strings.Replacer, args []string) (*config.Config, error) {
	var flags config.Flags
	fs := pflag.NewFlagSet("signalbox", pflag.ContinueOnError)
	flags.Add(fs)
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = replace.Replace(a)
	}
	if err := fs.Parse(words); err != nil {
		return nil, err
	}
	return flags.Config()
}
