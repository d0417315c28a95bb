// SPDX-License-Identifier: Apache-2.0

package config

import (
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/go-logr/logr"
	"k8s.io/component-base/featuregate"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/modes"
	"signalbox/proxier"
)

// The gates with an effect here, apart from those of proxier.Traits.
const (
	gateAllowServiceExternalIPs = "AllowServiceExternalIPs"
	gateLocalhostNodePorts      = "KubeProxyNFTablesLocalhostNodePorts"
)

// gateMatters says whether a gate has an effect here.
func gateMatters(name string) bool {
	if name == gateAllowServiceExternalIPs || name == gateLocalhostNodePorts ||
		slices.ContainsFunc(modes.All, func(m proxier.Mode) bool { return m.Traits().FeatureGate == name }) {
		return true
	}
	return gates()[featuregate.Feature(name)].LockToDefault
}

// knownGates has a line for each feature gate that kube-proxy 1.36, 1.37 or 1.38
// takes: all of Kubernetes' gates, since one list is often given to every
// component. A line is name, stage, default, and "locked" where it cannot be
// changed: those of 1.37 where it has the gate.
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
func gatesWith(wanted map[string]bool) featuregate.MutableFeatureGate {
	g := featuregate.NewFeatureGate()
	settable := maps.Clone(wanted)
	maps.DeleteFunc(settable, func(name string, on bool) bool { return gateIgnored(name, on) != "" })
	// gatesWithoutEffect reports what it would log.
	if err := errors.Join(g.Add(maps.Clone(gates())), g.SetFromMapWithLogger(logr.Discard(), settable)); err != nil {
		panic(err) // the embedded list contradicts itself
	}
	return g
}

// gateIgnored says why a gate cannot have the wanted value; empty if it can. This is
// never an error: clusters give one list of gates to components of all releases.
func gateIgnored(name string, on bool) string {
	spec, known := gates()[featuregate.Feature(name)]
	switch {
	case name == "AllAlpha" || name == "AllBeta":
		return ""
	case !known:
		return "kube-proxy 1.36 to 1.38 do not know it, and refuse to start with it"
	case spec.LockToDefault && on != spec.Default:
		return fmt.Sprintf("it is locked to %v, and kube-proxy 1.37 refuses to start with it", spec.Default)
	}
	return ""
}

func gateOn(k *v1alpha1.KubeProxyConfiguration, name featuregate.Feature) bool {
	return gatesWith(k.FeatureGates).Enabled(name)
}

// localhostRelay says whether the gate of KEP-6032 is on. As with kube-proxy 1.38,
// it is on by default: nodePortAddresses is the opt-in.
func localhostRelay(k *v1alpha1.KubeProxyConfiguration) bool {
	on, given := k.FeatureGates[gateLocalhostNodePorts]
	return on || !given
}

// gatesWithoutEffect names the gates that were set and have no effect here.
func gatesWithoutEffect(wanted map[string]bool) (out []string) {
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		switch why := gateIgnored(name, wanted[name]); {
		case why != "":
			out = append(out, fmt.Sprintf("no effect: feature gate %s=%v: %s", name, wanted[name], why))
		case !gateMatters(name):
			out = append(out, "no effect: feature gate "+name)
		}
	}
	return out
}

// ShowFeatureGates sets kubernetes_feature_enabled for every known feature gate, in
// the registry of the Kubernetes libraries.
func (c *Config) ShowFeatureGates() { gatesWith(c.KubeProxy.FeatureGates).AddMetrics() }
