// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// largeManifest is a Service whose ports times external IPs make many
// frontends. It shares the Pod of serviceTo.
func largeManifest(pod netip.Addr, ports, externalIPs int) string {
	var service, slice strings.Builder
	service.WriteString("apiVersion: v1\nkind: Service\nmetadata: {name: large}\nspec:\n  clusterIP: 10.96.1.1\n  clusterIPs: [10.96.1.1]\n  ports:\n")
	slice.WriteString("---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: large-1, labels: {kubernetes.io/service-name: large}}\naddressType: IPv4\n")
	slice.WriteString("endpoints: [{addresses: [" + pod.String() + "]}]\nports:\n")
	for p := range ports {
		fmt.Fprintf(&service, "  - {name: p%d, port: %d}\n", p, 1000+p)
		fmt.Fprintf(&slice, "  - {name: p%d, port: 8080}\n", p)
	}
	service.WriteString("  externalIPs:\n")
	for i := range externalIPs {
		fmt.Fprintf(&service, "  - %s\n", externalIP(i))
	}
	return service.String() + slice.String()
}

func externalIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18, byte(i / 250), byte(i%250 + 1)})
}

// While a large Service comes, changes, grows beyond the bound and goes, another
// Service is never unserved, its changes take effect, and the node is alive.
func TestLargeServiceBesideAnother(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables", "userspace"} {
		t.Run(mode, func(t *testing.T) { besideLarge(t, mode) })
	}
}

func besideLarge(t *testing.T, mode string) {
	const (
		ports, addrs = 12, 1000 // three slices of whole Service ports at least
		livez        = "http://127.0.0.1:10256/livez"
		metrics      = "http://127.0.0.1:10249/metrics"
	)
	lab := newLab(t)
	node, client, before, after := lab.Host("node1"), lab.Host("pod-x"), lab.Host("pod-a"), lab.Host("pod-b")
	source := serviceTo(t, before)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	web, first, last := netip.MustParseAddrPort("10.96.0.10:80"), netip.AddrPortFrom(externalIP(0), 1000), netip.AddrPortFrom(externalIP(addrs-1), 1000+ports-1)
	served := func(at ...netip.AddrPort) func() bool {
		return func() bool {
			return !slices.ContainsFunc(at, func(a netip.AddrPort) bool { return !answers(t, client, a, soon) })
		}
	}
	log := start(t, node, build(t), "run", "--source", source, "--mode", mode, "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16",
		"--conntrack-max-per-core=0", "--conntrack-min=0", "--oom-score-adj=0")
	eventually(t, "the rules are there", func() bool { return log.count("msg=synced family=IPv4") == 1 && page(node, livez) != "" })

	traffic, alive := keepAsking(t, client, web), probe(t, node, livez)
	write("large.yaml", largeManifest(before.Addr.V4, ports, addrs))
	write("web.yaml", strings.Replace(reloadManifest, "POD", after.Addr.V4.String(), 1))
	eventually(t, "the other Service's change takes effect", func() bool {
		a, err := client.Ask(t.Context(), "tcp", netip.AddrPort{}, web)
		return err == nil && a.Server == after.Name
	})
	eventually(t, "the large Service answers at both ends", served(first, last))
	write("large.yaml", largeManifest(after.Addr.V4, ports, addrs))
	eventually(t, "its endpoints change", func() bool {
		a, err := client.Ask(t.Context(), "tcp", netip.AddrPort{}, last)
		return err == nil && a.Server == after.Name
	})
	write("large.yaml", largeManifest(after.Addr.V4, 100*ports, addrs))
	eventually(t, "it is reported as too large", func() bool { return log.count("make more than 65536 frontends") == 1 })
	eventually(t, "it is not served any more", func() bool {
		return strings.Contains(page(node, metrics), "signalbox_service_ports{ip_family=\"IPv4\"} 1\n")
	})
	if answers(t, client, first, soon) || answers(t, client, last, soon) {
		t.Error("a Service that is too large answers")
	}
	write("large.yaml", largeManifest(after.Addr.V4, ports, addrs))
	eventually(t, "it is served again", served(first, last))
	if err := os.Remove(filepath.Join(source, "large.yaml")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is gone", func() bool { return !answers(t, client, first, soon) && !answers(t, client, last, soon) })
	for what, end := range map[string]func() (int, []error){"connections to the other Service": traffic, "probes of /livez": alive} {
		if asked, failed := end(); len(failed) > 0 || asked == 0 {
			t.Errorf("of %d %s %d failed: %v", asked, what, len(failed), errors.Join(failed[:min(5, len(failed))]...))
		}
	}
	if n := log.count("level=ERROR"); n != 0 {
		t.Errorf("%d errors were logged", n)
	}
}
