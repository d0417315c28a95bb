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
	"signalbox/proxier"
)

// reading is a configuration in kube-proxy's form, complete and not yet
// checked, with what the form cannot say.
type reading struct {
	*v1alpha1.KubeProxyConfiguration
	// file is where it was read; empty for the command line.
	file string
	// ownMode says that the mode comes from signalbox's own flag.
	ownMode bool
	// modeReason says where the mode comes from.
	modeReason string
	// modeUnset says that nothing names a mode.
	modeUnset bool
	// minSyncPeriod is what was asked for, 0 for nothing.
	minSyncPeriod time.Duration
	warnings      []string
}

func (f *Flags) read() (*reading, error) {
	r, err := f.readEither()
	if err != nil {
		return nil, err
	}
	settle(r.KubeProxyConfiguration)
	return r, nil
}

func (f *Flags) readEither() (*reading, error) {
	if f.file == "" {
		return f.readCommandLine()
	}
	k, ignored, err := f.readFile()
	if err != nil {
		return nil, err
	}
	return f.beside(k, ignored)
}

// beside puts the flags that count beside a file over what it says.
func (f *Flags) beside(k *v1alpha1.KubeProxyConfiguration, ignored error) (*reading, error) {
	r := &reading{KubeProxyConfiguration: k, file: f.file, ownMode: f.own.mode != ""}
	if ignored != nil {
		r.warnings = append(r.warnings, fmt.Sprintf("--config=%s: part of it is not read: %v", f.file, ignored))
	}
	r.warnings = append(r.warnings, f.leftToFile()...)
	r.modeUnset = f.own.mode == "" && k.Mode == ""
	r.modeReason = f.modeReason(k.Mode, "the file's mode", "the file of --config names no mode, which means iptables as with kube-proxy")
	k.Mode = cmp.Or(v1alpha1.ProxyMode(f.own.mode), k.Mode, ModeIPTables)
	r.minSyncPeriod = timingOf(k).minSync
	setDefaults(k)
	var err error
	if f.kubeProxy.HostnameOverride != "" {
		k.HostnameOverride, err = nodeName("--hostname-override", f.kubeProxy.HostnameOverride)
	}
	f.copyLogging(k)
	return r, err
}

// besideFile are kube-proxy's flags that count with --config too.
var besideFile = []string{"config", "write-config-to", "cleanup", "init-only", "master", "hostname-override"}

// leftToFile names the flags that --config makes useless, as it does
// kube-proxy's.
func (f *Flags) leftToFile() []string {
	var names []string
	f.groups.FlagSet(groupKubeProxy).VisitAll(func(flag *pflag.Flag) {
		if flag.Changed && !slices.Contains(besideFile, flag.Name) {
			names = append(names, "--"+flag.Name)
		}
	})
	if names == nil {
		return nil
	}
	return []string{fmt.Sprintf("no effect beside --config, which decides: %s", strings.Join(names, ", "))}
}

func (f *Flags) readCommandLine() (*reading, error) {
	k := f.kubeProxy.DeepCopy()
	r := &reading{KubeProxyConfiguration: k, ownMode: f.own.mode != ""}
	own, theirs := v1alpha1.ProxyMode(f.own.mode), k.Mode
	if own != "" && theirs != "" && own != theirs {
		return nil, fmt.Errorf("--mode=%s and --proxy-mode=%s contradict each other: give one of them", own, theirs)
	}
	unsaid, reason := v1alpha1.ProxyMode(ModeAuto), "nothing names a mode, which means auto; kube-proxy would take iptables, and --proxy-mode=iptables does so"
	if f.given("proxy-mode") {
		unsaid, reason = ModeIPTables, "--proxy-mode is given and empty, which means iptables as with kube-proxy"
	}
	r.modeUnset = own == "" && theirs == ""
	r.modeReason = f.modeReason(theirs, "--proxy-mode", reason)
	k.Mode = cmp.Or(own, theirs, unsaid)
	if k.Mode == ModeNFTables {
		f.copyToNFTables(k)
	}
	if t := timingOf(k); f.given(t.flag + "-min-sync-period") {
		r.minSyncPeriod = t.minSync
	}
	r.warnings = append(r.warnings, f.portFlags(k)...)
	var err error
	if k.HostnameOverride != "" {
		k.HostnameOverride, err = nodeName("--hostname-override", k.HostnameOverride)
	}
	return r, err
}

// modeReason says which of signalbox's own flag, what kube-proxy calls the mode,
// and neither of the two decides.
func (f *Flags) modeReason(theirs v1alpha1.ProxyMode, from, unsaid string) string {
	switch {
	case f.own.mode != "":
		return "--mode=" + f.own.mode
	case theirs != "":
		return fmt.Sprintf("%s: %s", from, theirs)
	}
	return unsaid
}

// nodeName is the node's name by what a flag or a field says, which errors name.
func nodeName(setting, override string) (string, error) {
	name, err := node.Name(override)
	if err != nil {
		return "", fmt.Errorf("%s=%q: %w; give the name of this node's Node object", setting, override, err)
	}
	return name, nil
}

// copyToNFTables makes the iptables flags count in nftables mode, which has
// none of its own. kube-proxy does so too, but for the bit of the packet mark.
func (f *Flags) copyToNFTables(k *v1alpha1.KubeProxyConfiguration) {
	from, to := &k.IPTables, &k.NFTables
	to.MasqueradeAll, to.SyncPeriod, to.MinSyncPeriod = from.MasqueradeAll, from.SyncPeriod, from.MinSyncPeriod
	if f.given("iptables-masquerade-bit") {
		*to.MasqueradeBit = *from.MasqueradeBit
	}
}

// portFlags completes the addresses to listen at from the flags for a port
// alone: 0 is for nowhere, and another port is for an address without one.
func (f *Flags) portFlags(k *v1alpha1.KubeProxyConfiguration) (warnings []string) {
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

// settle fills in what only the mode decides, and empties what it does not
// read in the sections of the other modes.
func settle(k *v1alpha1.KubeProxyConfiguration) {
	k.DetectLocalMode = cmp.Or(k.DetectLocalMode, v1alpha1.LocalMode(proxier.DetectLocalClusterCIDR))
	if k.Mode == ModeNFTables && len(k.NodePortAddresses) == 0 {
		k.NodePortAddresses = []string{proxier.NodePortsPrimary}
	}
	var none metav1.Duration
	if k.Mode == ModeNFTables {
		k.IPTables.MasqueradeAll = false
	} else {
		k.NFTables.MasqueradeAll = false
	}
	read := timingOf(k).field
	if read != "iptables" {
		k.IPTables.SyncPeriod, k.IPTables.MinSyncPeriod = none, none
	}
	if read != "ipvs" {
		k.IPVS.SyncPeriod, k.IPVS.MinSyncPeriod = none, none
	}
	if read != "nftables" {
		k.NFTables.SyncPeriod, k.NFTables.MinSyncPeriod = none, none
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
