// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

const localhostManifest = `apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: dns, port: 8080, protocol: UDP}]
endpoints: [{addresses: [POD]}]
`

// Connections to NodePorts on loopback go on whatever configuration follows, and
// new ones go where the configuration in force says.
func TestLocalhostOutlivesConfiguration(t *testing.T) {
	t.Parallel()
	lab := newLab(t)
	host, mounted, source := lab.Host("node1"), mountConfiguration(t), t.TempDir()
	text := strings.Replace(localhostManifest, "POD", lab.Host("pod-a").Addr.V4.String(), 1)
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const observed = "healthzBindAddress: \"0\"\nconntrack: {maxPerCore: 0}\nnodePortAddresses: [primary, localhost]\n"
	mounted.write(observed + "mode: nftables\n")
	log := start(t, host, build(t), "--config", mounted.path(), "--source", source)
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 })
	web, dns := netip.MustParseAddrPort("127.0.0.1:30080"), netip.MustParseAddrPort("127.0.0.1:30053")
	open, err := host.Open(t.Context(), "tcp", netip.AddrPort{}, web)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	refused := func(network string, at netip.AddrPort) bool {
		_, err := host.Ask(t.Context(), network, netip.AddrPort{}, at)
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	if !refused("udp", dns) {
		t.Error("UDP is not refused on loopback")
	}
	const prefix = "kubeproxy_nftables_localhost_nodeport_"
	d := &daemon{node: node{t, host}}
	d.answers("http://127.0.0.1:10249/metrics", 200, prefix+"listeners{ip_family=\"IPv4\"} 1\n", prefix+"listeners{ip_family=\"IPv6\"} 0\n",
		prefix+"listener_creation_failures_total{ip_family=\"IPv4\"} 0\n", prefix+"rejected_packets_total{ip_family=\"IPv4\",protocol=\"UDP\"} 1\n",
		prefix+"rejected_packets_total{ip_family=\"IPv4\",protocol=\"SCTP\"} 0\n")

	for i, change := range []string{"mode: nftables\niptables: {masqueradeBit: 15}\n", "mode: userspace\n", "mode: nftables\n", "mode: iptables\niptables: {localhostNodePorts: false}\n"} {
		mounted.write(observed + change)
		eventually(t, "the change takes effect: "+change, func() bool { return log.count("msg=starting") == i+2 && log.count("msg=synced family=IPv4") == i+2 })
		if i < 3 && !answers(t, host, web, hangTimeout) {
			t.Errorf("%q: a new connection is not answered", change)
		}
		if _, err := open.Ask(t.Context()); err != nil {
			t.Fatalf("%q: the open connection: %v", change, err)
		}
	}
	// No rule leads elsewhere here: the old listeners must be gone.
	eventually(t, "new connections are refused", func() bool { return refused("tcp", web) })
	if _, err := open.Ask(t.Context()); err != nil {
		t.Errorf("the open connection: %v", err)
	}
}
