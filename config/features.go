package config

import (
	_ "embed"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/go-logr/logr"
	"k8s.io/component-base/featuregate"
	"k8s.io/kube-proxy/config/v1alpha1"
)

const (
	gateAllowServiceExternalIPs = "AllowServiceExternalIPs"
	gateLocalhostNodePorts      = "KubeProxyNFTablesLocalhostNodePorts"
)

// knownGates has a line for each feature gate that kube-proxy 1.36 takes: all
// of Kubernetes' gates, since one list is often given to every component. A
// line is name, stage, default, and "locked" where it cannot be changed.
//
//go:embed featuregates.txt
var knownGates string

var gates = sync.OnceValue(func() map[featuregate.Feature]featuregate.FeatureSpec {
	out := map[featuregate.Feature]featuregate.FeatureSpec{}
	for line := range strings.Lines(knownGates) {
		words := strings.Fields(line)
		if len(words) < 3 {
			continue
		}
		spec := featuregate.FeatureSpec{Default: words[2] == "true", LockToDefault: len(words) > 3}
		switch words[1] {
		case "ALPHA":
			spec.PreRelease = featuregate.Alpha
		case "BETA":
			spec.PreRelease = featuregate.Beta
		case "DEPRECATED":
			spec.PreRelease = featuregate.Deprecated
		}
		out[featuregate.Feature(words[0])] = spec
	}
	return out
})

// gatesWith returns every known gate as wanted, or at its default.
func gatesWith(wanted map[string]bool) (featuregate.MutableFeatureGate, error) {
	g := featuregate.NewFeatureGate()
	if err := g.Add(maps.Clone(gates())); err != nil {
		panic(err) // the embedded list contradicts itself
	}
	// What it would log, withoutEffect says in other words.
	return g, g.SetFromMapWithLogger(logr.Discard(), wanted)
}

func gateOn(k *v1alpha1.KubeProxyConfiguration, name featuregate.Feature) bool {
	g, _ := gatesWith(k.FeatureGates) // featureGatesWrong names what is wrong with them
	return g.Enabled(name)
}

// localhostRelay says whether the gate of KEP-6032 is open. It is unless it was
// closed by name, as from kube-proxy 1.38 on: nodePortAddresses is the opt-in.
func localhostRelay(k *v1alpha1.KubeProxyConfiguration) bool {
	on, given := k.FeatureGates[gateLocalhostNodePorts]
	return on || !given
}

// gateMatters says whether anything here depends on a gate.
func gateMatters(name string) bool {
	return name == gateAllowServiceExternalIPs || name == gateLocalhostNodePorts || gates()[featuregate.Feature(name)].LockToDefault
}

func featureGatesWrong(wanted map[string]bool) string {
	if _, err := gatesWith(wanted); err != nil {
		text := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprint(wanted), "map["), "]")
		return fmt.Sprintf("%s: %v", strings.ReplaceAll(strings.ReplaceAll(text, ":", "="), " ", ","), err)
	}
	return ""
}
