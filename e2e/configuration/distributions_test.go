// SPDX-License-Identifier: Apache-2.0

package configuration

import (
	"context"
	"os/exec"
	"syscall"
	"testing"
)

const (
	k0s       = "clientConnection: {acceptContentTypes: \"\", burst: 0, contentType: \"\", kubeconfig: KUBECONFIG, qps: 0}\nclusterCIDR: 10.244.0.0/16\nconntrack: {maxPerCore: 0, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null}\nmetricsBindAddress: 0.0.0.0:10249\nmode: iptables\nnodePortAddresses: null"
	kubespray = "bindAddress: 0.0.0.0\nclientConnection: {burst: 10, contentType: application/vnd.kubernetes.protobuf, kubeconfig: KUBECONFIG, qps: 5}\nclusterCIDR: 10.233.64.0/18\nconfigSyncPeriod: 15m0s\nconntrack: {maxPerCore: 0, min: 131072, tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}\nenableProfiling: false\nhealthzBindAddress: 0.0.0.0:10256\nhostnameOverride: node-1\niptables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 0s, syncPeriod: 30s}\nipvs: {excludeCIDRs: [], minSyncPeriod: 0s, scheduler: rr, syncPeriod: 30s, strictARP: false, tcpTimeout: 0s, tcpFinTimeout: 0s, udpTimeout: 0s}\nmetricsBindAddress: 127.0.0.1:10249\nmode: nftables\nnodePortAddresses: []\noomScoreAdj: -999\nportRange: \"\""
)

// distributions are command lines and files that distributions start kube-proxy
// with, without what is of one cluster.
var distributions = []input{
	// k3s and RKE2; on an IPv6 node the second.
	{file: none, args: "--cluster-cidr=10.42.0.0/16 --conntrack-max-per-core=0 --conntrack-tcp-timeout-close-wait=0s --conntrack-tcp-timeout-established=0s --healthz-bind-address=127.0.0.1 --hostname-override=node-1 --kubeconfig=KUBECONFIG --proxy-mode=iptables"},
	{file: none, args: "--cluster-cidr=2001:cafe:42::/56 --conntrack-max-per-core=0 --conntrack-tcp-timeout-close-wait=0s --conntrack-tcp-timeout-established=0s --healthz-bind-address=::1 --hostname-override=node-1 --kubeconfig=KUBECONFIG --proxy-mode=iptables"},
	// MicroK8s, which names no mode.
	{file: none, args: "--kubeconfig=KUBECONFIG --cluster-cidr=10.1.0.0/16 --healthz-bind-address=127.0.0.1 --profiling=false", otherwise: map[string]string{"mode: iptables": "mode: auto"}, mode: "nftables"},
	// Typhoon, with the address of the node, and OVHcloud.
	{file: none, args: "--cluster-cidr=10.20.0.0/14 --hostname-override=node-1 --kubeconfig=KUBECONFIG --metrics-bind-address=127.0.0.1 --proxy-mode=ipvs"},
	{file: none, args: "--cluster-cidr=10.20.0.0/14 --hostname-override=node-1 --kubeconfig=KUBECONFIG --metrics-bind-address=127.0.0.1 --proxy-mode=nftables"},
	{file: none, args: "--cluster-cidr=10.240.0.0/13 --hostname-override=node-1 --kubeconfig=KUBECONFIG --metrics-bind-address=0.0.0.0 --proxy-mode=iptables"},
	// kOps, behind its /go-runner.
	{file: none, args: "--cluster-cidr=100.96.0.0/11 --conntrack-max-per-core=0 --hostname-override=node-1 --kubeconfig=KUBECONFIG --oom-score-adj=-998 --v=2 --proxy-mode=", runner: true},
	// Talos.
	{file: none, args: "--cluster-cidr=10.244.0.0/16 --conntrack-max-per-core=0 --hostname-override=node-1 --kubeconfig=KUBECONFIG --proxy-mode=nftables"},
	// GKE, with kube-proxy.
	{file: none, args: "--kubeconfig=KUBECONFIG --cluster-cidr=10.4.0.0/14 --oom-score-adj=-998 --v=2 --iptables-sync-period=1m --iptables-min-sync-period=10s --ipvs-sync-period=1m --ipvs-min-sync-period=10s --detect-local-mode=NodeCIDR --proxy-mode=iptables"},
	// AKS.
	{file: none, args: "--conntrack-max-per-core=0 --metrics-bind-address=0.0.0.0:10249 --kubeconfig=KUBECONFIG --cluster-cidr=10.244.0.0/16 --detect-local-mode=ClusterCIDR --pod-interface-name-prefix= --proxy-mode=iptables --v=3"},
	// EKS.
	{args: "--v=2 --hostname-override=node-1", file: "bindAddress: 0.0.0.0\nclientConnection: {acceptContentTypes: \"\", burst: 10, contentType: application/vnd.kubernetes.protobuf, kubeconfig: KUBECONFIG, qps: 5}\nclusterCIDR: \"\"\nconfigSyncPeriod: 15m0s\nconntrack: {maxPerCore: 0, min: 131072, tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}\nenableProfiling: false\nhealthzBindAddress: 0.0.0.0:10256\nhostnameOverride: \"\"\niptables: {masqueradeAll: false, masqueradeBit: 14, minSyncPeriod: 0s, syncPeriod: 30s}\nipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: \"\", syncPeriod: 30s}\nmetricsBindAddress: 0.0.0.0:10249\nmode: iptables\nnodePortAddresses: null\noomScoreAdj: -998\nportRange: \"\""},
	// kubeadm.
	{args: "--hostname-override=node-1", file: "bindAddress: 0.0.0.0\nbindAddressHardFail: false\nclientConnection: {acceptContentTypes: \"\", burst: 0, contentType: \"\", kubeconfig: KUBECONFIG, qps: 0}\nclusterCIDR: 10.244.0.0/16\nconfigSyncPeriod: 0s\nconntrack: {maxPerCore: 0, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}\ndetectLocal: {bridgeInterface: \"\", interfaceNamePrefix: \"\"}\ndetectLocalMode: \"\"\nenableProfiling: false\nhealthzBindAddress: \"\"\nhostnameOverride: \"\"\niptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}\nipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: \"\", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}\nlogging: {flushFrequency: 0, options: {json: {infoBufferSize: \"0\"}, text: {infoBufferSize: \"0\"}}, verbosity: 0}\nmetricsBindAddress: \"\"\nmode: \"\"\nnftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}\nnodePortAddresses: null\noomScoreAdj: null\nportRange: \"\"\nshowHiddenMetricsForVersion: \"\"\nwinkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: \"\", rootHnsEndpointName: \"\", sourceVip: \"\"}"},
	// k0s, and kubespray, also with gates of the whole cluster. kube-proxy refuses gates that it does not know.
	{args: "--hostname-override=node-1", file: k0s},
	{args: "--hostname-override=node-1", file: k0s + "\nfeatureGates: {SidecarContainers: true}", accepted: true},
	{args: "--hostname-override=node-1", file: kubespray},
	{args: "--hostname-override=node-1", file: kubespray + "\nfeatureGates: {AllBeta: false, SupportIPVSProxyMode: true}", accepted: true},
	{args: "--hostname-override=node-1", file: "mode: iptables\nfeatureGates: {AllBeta: true, KubeProxyIPVS: true, KubeletInUserNamespace: true, UserNamespacesSupport: true}"},
}

// In MicroK8s, kubelite runs kube-proxy's command in its own process, which ends when the
// command fails. The flag of docs/recipes.md ends the command without an error.
func TestMicroK8sWithoutKubeProxy(t *testing.T) {
	kubeProxy, _ := build(t)
	ctx, cancel := context.WithTimeout(t.Context(), hangTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, kubeProxy, "--cluster-cidr=10.1.0.0/16", "--healthz-bind-address=127.0.0.1", "--profiling=false", "--help=true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET} // for a kube-proxy that runs
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %v\n%s", cmd.Args, err, said)
	}
}
