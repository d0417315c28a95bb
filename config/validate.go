// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/component-base/featuregate"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"

	"signalbox/modes"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

// rule is the result of one check. field is the setting in the file, flag the flag
// for it. wrong is the value and what is wrong with it, or empty.
type rule struct{ field, flag, wrong string }

// validate returns all broken rules. Each names the setting as it is called where
// it was set: in the file or on the command line.
func (r *rawConfig) validate() error {
	var wrong []error
	for _, rule := range r.rules() {
		switch {
		case rule.wrong == "":
		case r.file != "":
			wrong = append(wrong, fmt.Errorf("--config=%s: %s: %s", r.file, rule.field, strings.TrimPrefix(rule.wrong, ": ")))
		default:
			wrong = append(wrong, fmt.Errorf("--%s=%s", rule.flag, rule.wrong))
		}
	}
	return errors.Join(wrong...)
}

func (r *rawConfig) rules() []rule {
	k := r.KubeProxyConfiguration
	c, local := &k.Conntrack, &k.DetectLocal
	section, traits := sectionOf(k), modes.TraitsOf(string(k.Mode))
	list := []rule{
		{"iptables.masqueradeBit", "iptables-masquerade-bit", between(*k.IPTables.MasqueradeBit, 0, 31, "the packet mark has the bits 0 to 31")},
		{section.field + ".syncPeriod", section.flags + "-sync-period", positive(section.syncPeriod.Duration)},
		{section.field + ".minSyncPeriod", section.flags + "-min-sync-period", minSyncPeriod(section)},
		{"clientConnection.burst", "kube-api-burst", notNegative(k.ClientConnection.Burst)},
		{"configSyncPeriod", "config-sync-period", positive(k.ConfigSyncPeriod.Duration)},
		{"bindAddress", "bind-address", address(k.BindAddress)},
		{"healthzBindAddress", "healthz-bind-address", listenAddress(k.HealthzBindAddress)},
		{"metricsBindAddress", "metrics-bind-address", listenAddress(k.MetricsBindAddress)},
		{"clusterCIDR", "cluster-cidr", clusterCIDR(k.ClusterCIDR)},
		{"nodePortAddresses", "nodeport-addresses", nodePortAddresses(k.NodePortAddresses)},
		{"detectLocalMode", "detect-local-mode", oneOf(string(k.DetectLocalMode), detectLocalModes)},
		{"detectLocal.bridgeInterface", "pod-bridge-interface", interfaceFor(service.DetectLocalBridgeInterface, k, local.BridgeInterface)},
		{"detectLocal.interfaceNamePrefix", "pod-interface-name-prefix", interfaceFor(service.DetectLocalInterfaceNamePrefix, k, local.InterfaceNamePrefix)},
		{"oomScoreAdj", "oom-score-adj", between(*k.OOMScoreAdj, -1000, 1000, "must be from -1000 to 1000")},
		{"conntrack.maxPerCore", "conntrack-max-per-core", notNegative(*c.MaxPerCore)},
		{"conntrack.min", "conntrack-min", notNegative(*c.Min)},
		{"conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established", notNegative(c.TCPEstablishedTimeout.Duration)},
		{"conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait", notNegative(c.TCPCloseWaitTimeout.Duration)},
		{"conntrack.udpTimeout", "conntrack-udp-timeout", notNegative(c.UDPTimeout.Duration)},
		{"conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream", notNegative(c.UDPStreamTimeout.Duration)},
	}
	if !r.modeFlag {
		list = append(list, rule{"mode", "proxy-mode", proxyMode(k)})
	}
	if section.masqueradeField != "iptables" {
		list = append(list, rule{section.masqueradeField + ".masqueradeBit", "iptables-masquerade-bit", between(*section.masqueradeBit, 0, 31, "the packet mark has the bits 0 to 31")})
	}
	if traits.Schedulers {
		list = append(list,
			rule{"ipvs.scheduler", "ipvs-scheduler", scheduler(k.IPVS.Scheduler)},
			rule{"ipvs.tcpTimeout", "ipvs-tcp-timeout", notNegative(k.IPVS.TCPTimeout.Duration)},
			rule{"ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout", notNegative(k.IPVS.TCPFinTimeout.Duration)},
			rule{"ipvs.udpTimeout", "ipvs-udp-timeout", notNegative(k.IPVS.UDPTimeout.Duration)},
			rule{"ipvs.excludeCIDRs", "ipvs-exclude-cidrs", cidrs(k.IPVS.ExcludeCIDRs)},
		)
	}
	return append(list, loggingRules(k)...)
}

// loggingRules are the rules of Kubernetes' components, with their messages.
func loggingRules(k *v1alpha1.KubeProxyConfiguration) []rule {
	flags := map[string]string{
		"logging.format": "logging-format", "logging.flushFrequency": logsapi.LogFlushFreqFlagName,
		"logging.verbosity": "v", "logging.vmodule": "vmodule",
		"logging.options.text.splitStream": "log-text-split-stream", "logging.options.text.infoBufferSize": "log-text-info-buffer-size",
		"logging.options.json.splitStream": "log-json-split-stream", "logging.options.json.infoBufferSize": "log-json-info-buffer-size",
	}
	var list []rule
	for _, err := range logsapi.Validate(&k.Logging, gatesWith(k.FeatureGates), field.NewPath("logging")) {
		name, _, _ := strings.Cut(err.Field, "[")
		flag, ok := flags[name]
		if !ok {
			flag = "logging-format"
		}
		list = append(list, rule{err.Field, flag, fmt.Sprintf("%v: %s", err.BadValue, err.Detail)})
	}
	return list
}

func proxyMode(k *v1alpha1.KubeProxyConfiguration) string {
	if gate := modes.TraitsOf(string(k.Mode)).FeatureGate; gate != "" && !gateOn(k, featuregate.Feature(gate)) {
		return fmt.Sprintf("%s: the feature gate %s is set to false: set it to true, leave it out, or take another mode", k.Mode, gate)
	}
	return oneOf(string(k.Mode), modes.Names())
}

func oneOf(value string, known []string) string {
	if value == "" || slices.Contains(known, value) {
		return ""
	}
	return fmt.Sprintf("%s: not one of %s", value, strings.Join(known, ", "))
}

func between(value, low, high int32, why string) string {
	if low <= value && value <= high {
		return ""
	}
	return fmt.Sprintf("%d: %s", value, why)
}

func notNegative[T int32 | time.Duration](value T) string {
	if value >= 0 {
		return ""
	}
	return fmt.Sprintf("%v: must not be negative", value)
}

func positive(value time.Duration) string {
	if value > 0 {
		return ""
	}
	return fmt.Sprintf("%v: must be more than 0", value)
}

func minSyncPeriod(s section) string {
	least, period := s.minSyncPeriod.Duration, s.syncPeriod.Duration
	if wrong := notNegative(least); wrong != "" {
		return wrong
	}
	if least > period && period > 0 {
		return fmt.Sprintf("%v: must not be longer than the sync period, which is %v", least, period)
	}
	return ""
}

func address(text string) string {
	if _, ok := service.ParseAddr(text); !ok {
		return fmt.Sprintf("%s: not an IP address", text)
	}
	return ""
}

// listenAddress accepts no host name: it may have several addresses.
func listenAddress(text string) string {
	if text == "" || text == off {
		return ""
	}
	a, ok := parseAddrPort(text)
	switch {
	case !ok:
		return fmt.Sprintf("%s: not an IP address, with or without a port, such as 127.0.0.1:10249 or ::1, nor %s for nowhere", text, off)
	case a.Port() == 0:
		return fmt.Sprintf("%s: the port must be from 1 to 65535; %s alone is for nowhere", text, off)
	}
	return ""
}

// parseAddrPort reads an address and a port, with brackets around IPv6.
func parseAddrPort(text string) (netip.AddrPort, bool) {
	host, number, err := net.SplitHostPort(text)
	if err != nil {
		return netip.AddrPort{}, false
	}
	a, ok := service.ParseAddr(host)
	port, err := strconv.ParseUint(number, 10, 16)
	return netip.AddrPortFrom(a, uint16(port)), ok && err == nil
}

func clusterCIDR(text string) string {
	if text == "" {
		return ""
	}
	list := strings.Split(text, ",")
	if wrong := cidrs(list); wrong != "" {
		return wrong
	}
	if p := prefixes(list); len(p) > 2 || len(p) == 2 && plan.FamilyOf(p[0].Addr()) == plan.FamilyOf(p[1].Addr()) {
		return fmt.Sprintf("%s: at most one range of each IP family", text)
	}
	return ""
}

func cidrs(list []string) string {
	for _, text := range list {
		if _, ok := service.ParsePrefix(text); !ok {
			return fmt.Sprintf("%s: %q is not a CIDR such as 10.0.0.0/8 or fd00::/48", strings.Join(list, ","), text)
		}
	}
	return ""
}

func nodePortAddresses(list []string) string {
	if _, err := service.ParseNodePortAddresses(list); err != nil {
		return fmt.Sprintf("%s: %v", strings.Join(list, ","), err)
	}
	return ""
}

var detectLocalModes = []string{
	string(service.DetectLocalClusterCIDR), string(service.DetectLocalNodeCIDR),
	string(service.DetectLocalBridgeInterface), string(service.DetectLocalInterfaceNamePrefix),
}

// interfaceFor checks the interface name, or the prefix of one, that a mode needs.
func interfaceFor(mode service.DetectLocal, k *v1alpha1.KubeProxyConfiguration, name string) string {
	const longest = 15 // the kernel's IFNAMSIZ, less the byte that ends it
	switch {
	case service.DetectLocal(k.DetectLocalMode) != mode:
		return ""
	case name == "":
		return fmt.Sprintf(": the mode %s of telling Pods from other traffic needs it", mode)
	case strings.ContainsAny(name, "/ \t\n"):
		return fmt.Sprintf("%q: not the name of an interface", name)
	case len(name) > longest:
		return fmt.Sprintf("%s: the kernel's interface names have at most %d characters", name, longest)
	}
	return ""
}

func scheduler(name string) string {
	if name != "" && !service.ValidScheduler(name) {
		return fmt.Sprintf("%s: not a name of a scheduler: at most 15 lower-case letters, digits and underscores", name)
	}
	return ""
}

// prefixes parses what cidrs has accepted.
func prefixes(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range list {
		if p, ok := service.ParsePrefix(text); ok {
			out = append(out, p)
		}
	}
	return out
}
