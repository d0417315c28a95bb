// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"
	"k8s.io/utils/ptr"

	"signalbox/modes"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/service"
)

// Config validates the flags and the file of --config. The error has all
// mistakes, not only the first.
func (f *Flags) Config() (*Config, error) {
	f.Groups()
	r, err := f.read()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(r.validate(), f.signalbox.validate(r.KubeProxyConfiguration, f.master)); err != nil {
		return nil, err
	}
	return f.build(r)
}

func (o *signalboxFlags) validate(k *v1alpha1.KubeProxyConfiguration, master string) error {
	var wrong []error
	if mode := oneOf(o.mode, modes.Names()); mode != "" {
		wrong = append(wrong, fmt.Errorf("--mode=%s", mode))
	}
	if o.source == "" {
		return errors.Join(wrong...)
	}
	if k.ClientConnection.Kubeconfig != "" || master != "" {
		wrong = append(wrong, fmt.Errorf("--source=%s contradicts --kubeconfig and --master: objects come from a directory or from an API server, not from both", o.source))
	} else if info, err := os.Stat(o.source); err == nil && !info.IsDir() {
		wrong = append(wrong, fmt.Errorf("--source=%s: not a directory; name the one that the manifests are in", o.source))
	}
	return errors.Join(wrong...)
}

// build turns a valid configuration into a Config.
func (f *Flags) build(r *rawConfig) (*Config, error) {
	k, section := r.KubeProxyConfiguration, sectionOf(r.KubeProxyConfiguration)
	setting := "--hostname-override"
	if r.file != "" {
		setting = fmt.Sprintf("--config=%s: hostnameOverride", r.file)
	}
	name, err := nodeName(setting, k.HostnameOverride)
	if err != nil {
		return nil, err
	}
	client := &k.ClientConnection
	f.kubeconfig, f.digest = client.Kubeconfig, digestOf(client.Kubeconfig)
	return &Config{
		Mode: string(k.Mode), ModeReason: r.modeReason, ModeUnset: r.modeUnset, NodeName: name,
		SourceDir: f.signalbox.source, RunDir: f.signalbox.runDir, StateDir: f.signalbox.stateDir, StatusPage: f.signalbox.statusPage, Kubeconfig: client.Kubeconfig, KubeconfigDigest: f.digest, Master: f.master,
		ContentType: client.ContentType, AcceptContentTypes: client.AcceptContentTypes, QPS: client.QPS, Burst: int(client.Burst),
		MasqueradeMark: 1 << *section.masqueradeBit, IPVS: ipvsTuning(k), Settings: f.settings(k), LocalhostRelay: localhostRelay(k),
		BindAddress: bindAddress(k), HealthzBindAddress: listener(k.HealthzBindAddress), MetricsBindAddress: listener(k.MetricsBindAddress),
		BindAddressHardFail: k.BindAddressHardFail, EnableProfiling: k.EnableProfiling,
		SyncPeriod: section.syncPeriod.Duration, MinSyncPeriod: r.minSyncPeriod, MaxProcessor: float64(f.signalbox.maxCPU) / 100,
		Conntrack: conntrack(k), OOMScoreAdj: k.OOMScoreAdj,
		Cleanup: f.cleanup, InitOnly: f.initOnly, WriteTo: f.writeTo,
		Logging:   Logging{Format: k.Logging.Format, Verbosity: int(k.Logging.Verbosity)},
		KubeProxy: k, KubernetesVersion: f.signalbox.version.release(),
		Warnings: slices.Concat(r.warnings, withoutEffect(k), f.flagsWithoutEffect(k)),
	}, nil
}

func (f *Flags) settings(k *v1alpha1.KubeProxyConfiguration) service.Settings {
	s := service.Settings{
		MasqueradeAll:      *sectionOf(k).masqueradeAll,
		DetectLocal:        service.DetectLocal(k.DetectLocalMode),
		PodBridgeInterface: k.DetectLocal.BridgeInterface, PodInterfaceNamePrefix: k.DetectLocal.InterfaceNamePrefix,
		IgnoreExternalIPs:     !gateOn(k, gateAllowServiceExternalIPs),
		KubeProxyIPVSPolicies: f.signalbox.kubeProxyIPVSPolicies,
		ExternalIPCIDRs:       f.signalbox.externalIPCIDRs,
		ResetRemovedEndpoints: f.signalbox.resetRemovedEndpoints,
	}
	if k.ClusterCIDR != "" {
		s.ClusterCIDRs = prefixes(strings.Split(k.ClusterCIDR, ","))
	}
	if a := bindAddress(k); !a.IsUnspecified() {
		s.NodeAddress = a
	}
	if *k.IPTables.LocalhostNodePorts {
		s.LocalhostNodePorts = service.LocalhostCovered
	}
	s.NodePortAddresses, _ = service.ParseNodePortAddresses(k.NodePortAddresses) // rules names what is wrong with them
	return s
}

func ipvsTuning(k *v1alpha1.KubeProxyConfiguration) proxier.IPVSTuning {
	return proxier.IPVSTuning{
		Scheduler: k.IPVS.Scheduler, StrictARP: k.IPVS.StrictARP,
		TCPTimeout: wholeSeconds(k.IPVS.TCPTimeout.Duration), TCPFinTimeout: wholeSeconds(k.IPVS.TCPFinTimeout.Duration),
		UDPTimeout: wholeSeconds(k.IPVS.UDPTimeout.Duration),
	}
}

// wholeSeconds rounds up: IPVS has whole seconds, and 0 would keep the kernel's
// value.
func wholeSeconds(d time.Duration) time.Duration {
	return (d + time.Second - 1).Truncate(time.Second)
}

func conntrack(k *v1alpha1.KubeProxyConfiguration) node.Conntrack {
	c := &k.Conntrack
	return node.Conntrack{
		MaxPerCore: ptr.Deref(c.MaxPerCore, 0), Min: ptr.Deref(c.Min, 0),
		TCPEstablishedTimeout: c.TCPEstablishedTimeout.Duration, TCPCloseWaitTimeout: c.TCPCloseWaitTimeout.Duration,
		TCPBeLiberal: c.TCPBeLiberal, UDPTimeout: c.UDPTimeout.Duration, UDPStreamTimeout: c.UDPStreamTimeout.Duration,
	}
}

func bindAddress(k *v1alpha1.KubeProxyConfiguration) netip.Addr {
	a, _ := service.ParseAddr(k.BindAddress) // valid: a rule checks it
	return a
}

// listener is the address of a server; invalid if there is no server.
func listener(text string) netip.AddrPort {
	a, _ := parseAddrPort(text)
	return a
}

// withoutEffect names the settings that are accepted and have no effect, or another
// effect than their name suggests.
func withoutEffect(k *v1alpha1.KubeProxyConfiguration) []string {
	out := loggingWithoutEffect(&k.Logging)
	add := func(when bool, format string, args ...any) {
		if when {
			out = append(out, fmt.Sprintf(format, args...))
		}
	}
	local := v1alpha1.LocalMode(service.DetectLocalClusterCIDR)
	add(k.DetectLocalMode == local && k.ClusterCIDR == "",
		"--cluster-cidr is not given, nor clusterCIDR in a file: Pods cannot be told from other traffic, so nothing sent to a cluster IP from outside the cluster is masqueraded")
	for mode, other := range map[service.DetectLocal][2]string{
		service.DetectLocalBridgeInterface:     {"--pod-bridge-interface", k.DetectLocal.BridgeInterface},
		service.DetectLocalInterfaceNamePrefix: {"--pod-interface-name-prefix", k.DetectLocal.InterfaceNamePrefix},
	} {
		add(other[1] != "" && k.DetectLocalMode != v1alpha1.LocalMode(mode), "%s=%s has no effect with --detect-local-mode=%s", other[0], other[1], k.DetectLocalMode)
	}
	add(len(k.IPVS.ExcludeCIDRs) > 0, "no effect: --ipvs-exclude-cidrs: virtual servers of others are left alone anyway")
	add(k.ConfigSyncPeriod.Duration != 15*time.Minute, "no effect: --config-sync-period: watches miss nothing")
	add(k.ShowHiddenMetricsForVersion != "", "no effect: --show-hidden-metrics-for-version: no metric is hidden")
	add(k.Winkernel != (v1alpha1.KubeProxyWinkernelConfiguration{}) || k.WindowsRunAsService, "no effect: winkernel and windowsRunAsService: this is not Windows")
	return append(out, gatesWithoutEffect(k.FeatureGates)...)
}

func (f *Flags) flagsWithoutEffect(k *v1alpha1.KubeProxyConfiguration) []string {
	var out []string
	if !modes.TraitsOf(string(k.Mode)).Schedulers && (f.signalbox.kubeProxyIPVSPolicies || ipvsTuning(k) != (proxier.IPVSTuning{})) {
		out = append(out, "the --ipvs flags have no effect without --mode=ipvs")
	}
	for _, name := range []string{"boot-id-file", "machine-id-file"} {
		if f.given(name) {
			out = append(out, "no effect: --"+name)
		}
	}
	return out
}
