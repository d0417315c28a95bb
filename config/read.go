package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"

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
	k.Mode = cmp.Or(v1alpha1.ProxyMode(f.signalbox.mode), k.Mode, ModeIPTables)
	r.minSyncPeriod = timingOf(k).minSync
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
	fallback, reason := v1alpha1.ProxyMode(ModeAuto), "nothing names a mode, which means auto; kube-proxy would take iptables, and --proxy-mode=iptables does so"
	if f.given("proxy-mode") {
		fallback, reason = ModeIPTables, "--proxy-mode is given and empty, which means iptables as with kube-proxy"
	}
	r.modeUnset = mode == "" && proxyMode == ""
	r.modeReason = f.modeReason(proxyMode, "--proxy-mode", reason)
	k.Mode = cmp.Or(mode, proxyMode, fallback)
	if k.Mode == ModeNFTables {
		f.copyToNFTables(k)
	}
	if t := timingOf(k); f.given(t.flag + "-min-sync-period") {
		r.minSyncPeriod = t.minSync
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

// copyToNFTables applies the iptables flags to nftables mode, which has no flags of
// its own. kube-proxy does the same, except for the bit of the packet mark.
func (f *Flags) copyToNFTables(k *v1alpha1.KubeProxyConfiguration) {
	from, to := &k.IPTables, &k.NFTables
	to.MasqueradeAll, to.SyncPeriod, to.MinSyncPeriod = from.MasqueradeAll, from.SyncPeriod, from.MinSyncPeriod
	if f.given("iptables-masquerade-bit") {
		*to.MasqueradeBit = *from.MasqueradeBit
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

// complete sets what depends on the mode, and clears what the mode does not read
// in the sections of the other modes.
func complete(k *v1alpha1.KubeProxyConfiguration) {
	k.DetectLocalMode = cmp.Or(k.DetectLocalMode, v1alpha1.LocalMode(service.DetectLocalClusterCIDR))
	if k.Mode == ModeNFTables && len(k.NodePortAddresses) == 0 {
		k.NodePortAddresses = []string{service.NodePortsPrimary}
	}
	k.IPTables.MasqueradeAll = k.IPTables.MasqueradeAll && k.Mode != ModeNFTables
	k.NFTables.MasqueradeAll = k.NFTables.MasqueradeAll && k.Mode == ModeNFTables
	for section, periods := range map[string][2]*metav1.Duration{
		"iptables": {&k.IPTables.SyncPeriod, &k.IPTables.MinSyncPeriod},
		"ipvs":     {&k.IPVS.SyncPeriod, &k.IPVS.MinSyncPeriod},
		"nftables": {&k.NFTables.SyncPeriod, &k.NFTables.MinSyncPeriod},
	} {
		if section != timingOf(k).field {
			*periods[0], *periods[1] = metav1.Duration{}, metav1.Duration{}
		}
	}
	k.PortRange = ""
	k.APIVersion, k.Kind = v1alpha1.SchemeGroupVersion.String(), kind
}

// timing are the sync periods in the section that a mode reads.
type timing struct {
	field, flag   string
	sync, minSync time.Duration
}

func timingOf(k *v1alpha1.KubeProxyConfiguration) timing {
	switch k.Mode {
	case ModeIPVS:
		return timing{"ipvs", "ipvs", k.IPVS.SyncPeriod.Duration, k.IPVS.MinSyncPeriod.Duration}
	case ModeNFTables:
		return timing{"nftables", "iptables", k.NFTables.SyncPeriod.Duration, k.NFTables.MinSyncPeriod.Duration}
	}
	return timing{"iptables", "iptables", k.IPTables.SyncPeriod.Duration, k.IPTables.MinSyncPeriod.Duration}
}
