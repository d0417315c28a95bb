// SPDX-License-Identifier: Apache-2.0

package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier/service"
)

// rawConfig is a configuration in kube-proxy's form, before it is validated, and
// what that form cannot express.
type rawConfig struct {
	*v1alpha1.KubeProxyConfiguration
	// file is --config; empty for the command line.
	file string
	// modeFlag: the mode comes from signalbox's own flag --mode.
	modeFlag bool
	// modeReason says where the mode comes from.
	modeReason string
	// modeUnset: nothing names a mode.
	modeUnset bool
	// minSyncPeriod is the configured value, 0 for none.
	minSyncPeriod time.Duration
	warnings      []string
}

func (f *Flags) read() (r *rawConfig, err error) {
	if f.file == "" {
		r, err = f.readCommandLine()
	} else {
		r, err = f.mergeFile(f.readFile())
	}
	if err != nil {
		return nil, err
	}
	complete(r.KubeProxyConfiguration)
	return r, nil
}

// mergeFile lets the flags that count together with a file override the file.
func (f *Flags) mergeFile(k *v1alpha1.KubeProxyConfiguration, ignored, err error) (*rawConfig, error) {
	if err != nil {
		return nil, err
	}
	r := &rawConfig{KubeProxyConfiguration: k, file: f.file, modeFlag: f.signalbox.mode != ""}
	if ignored != nil {
		r.warnings = append(r.warnings, fmt.Sprintf("--config=%s: part of it is not read: %v", f.file, ignored))
	}
	if names := f.ignoredFlags(); names != nil {
		r.warnings = append(r.warnings, fmt.Sprintf("no effect beside --config, which decides: %s", strings.Join(names, ", ")))
	}
	r.modeUnset = f.signalbox.mode == "" && k.Mode == ""
	r.modeReason = f.modeReason(k.Mode, "the file's mode", "the file of --config names no mode, which means iptables as with kube-proxy")
	k.Mode = cmp.Or(v1alpha1.ProxyMode(f.signalbox.mode), k.Mode, modes.OfKubeProxy)
	r.minSyncPeriod = sectionOf(k).minSyncPeriod.Duration
	setDefaults(k)
	if f.kubeProxy.HostnameOverride != "" {
		k.HostnameOverride, err = nodeName("--hostname-override", f.kubeProxy.HostnameOverride)
	}
	f.copyLogging(k)
	return r, err
}

// flagsWithFile are kube-proxy's flags that count together with --config.
var flagsWithFile = []string{"config", "write-config-to", "cleanup", "init-only", "master", "hostname-override"}

// ignoredFlags names the flags on the command line that have no effect with
// --config, as with kube-proxy.
func (f *Flags) ignoredFlags() (names []string) {
	f.groups.FlagSet(groupKubeProxy).VisitAll(func(flag *pflag.Flag) {
		if flag.Changed && !slices.Contains(flagsWithFile, flag.Name) {
			names = append(names, "--"+flag.Name)
		}
	})
	return names
}

func (f *Flags) readCommandLine() (*rawConfig, error) {
	k := f.kubeProxy.DeepCopy()
	r := &rawConfig{KubeProxyConfiguration: k, modeFlag: f.signalbox.mode != ""}
	mode, proxyMode := v1alpha1.ProxyMode(f.signalbox.mode), k.Mode
	if mode != "" && proxyMode != "" && mode != proxyMode {
		return nil, fmt.Errorf("--mode=%s and --proxy-mode=%s contradict each other: give one of them", mode, proxyMode)
	}
	fallback, reason := v1alpha1.ProxyMode(modes.Auto), "nothing names a mode, which means auto; kube-proxy would take iptables, and --proxy-mode=iptables does so"
	if f.given("proxy-mode") {
		fallback, reason = modes.OfKubeProxy, "--proxy-mode is given and empty, which means iptables as with kube-proxy"
	}
	r.modeUnset = mode == "" && proxyMode == ""
	r.modeReason = f.modeReason(proxyMode, "--proxy-mode", reason)
	k.Mode = cmp.Or(mode, proxyMode, fallback)
	s := sectionOf(k)
	if s.flags != s.field {
		f.copyFlags(s, k)
	}
	if f.given(s.flags + "-min-sync-period") {
		r.minSyncPeriod = s.minSyncPeriod.Duration
	}
	r.warnings = append(r.warnings, f.applyPortFlags(k)...)
	var err error
	if k.HostnameOverride != "" {
		k.HostnameOverride, err = nodeName("--hostname-override", k.HostnameOverride)
	}
	return r, err
}

// modeReason says which setting decides the mode: --mode, kube-proxy's setting, or
// neither.
func (f *Flags) modeReason(proxyMode v1alpha1.ProxyMode, setting, fallback string) string {
	switch {
	case f.signalbox.mode != "":
		return "--mode=" + f.signalbox.mode
	case proxyMode != "":
		return fmt.Sprintf("%s: %s", setting, proxyMode)
	}
	return fallback
}

// nodeName is the node's name; errors name the flag or the field.
func nodeName(setting, override string) (string, error) {
	name, err := node.Name(override)
	if err != nil {
		return "", fmt.Errorf("%s=%q: %w; give the name of this node's Node object", setting, override, err)
	}
	return name, nil
}

// copyFlags applies the iptables flags to a section without flags of its own.
// kube-proxy does the same, except for the bit of the packet mark.
func (f *Flags) copyFlags(to section, k *v1alpha1.KubeProxyConfiguration) {
	from := &k.IPTables
	*to.masqueradeAll, *to.syncPeriod, *to.minSyncPeriod = from.MasqueradeAll, from.SyncPeriod, from.MinSyncPeriod
	if f.given("iptables-masquerade-bit") {
		*to.masqueradeBit = *from.MasqueradeBit
	}
}

// applyPortFlags applies the flags for a port alone: 0 switches the server off,
// and another port completes an address without one.
func (f *Flags) applyPortFlags(k *v1alpha1.KubeProxyConfiguration) (warnings []string) {
	for _, server := range []struct {
		name    string
		port    int32
		address *string
	}{{"healthz", f.healthzPort, &k.HealthzBindAddress}, {"metrics", f.metricsPort, &k.MetricsBindAddress}} {
		given := cmp.Or(*server.address, off)
		*server.address = withPort(given, server.port)
		switch {
		case server.port == 0:
			*server.address = off
		case *server.address == given && f.given(server.name+"-port"):
			warnings = append(warnings, fmt.Sprintf("no effect: --%[1]s-port=%[2]d: --%[1]s-bind-address=%[3]s decides; give an address without a port there, or the port with it", server.name, server.port, given))
		}
	}
	return warnings
}

// complete sets what depends on the mode.
func complete(k *v1alpha1.KubeProxyConfiguration) {
	k.DetectLocalMode = cmp.Or(k.DetectLocalMode, v1alpha1.LocalMode(service.DetectLocalClusterCIDR))
	if modes.TraitsOf(string(k.Mode)).PrimaryNodePorts && len(k.NodePortAddresses) == 0 {
		k.NodePortAddresses = []string{service.NodePortsPrimary}
	}
	clearUnread(k)
	k.PortRange = ""
	k.APIVersion, k.Kind = v1alpha1.SchemeGroupVersion.String(), kind
}
