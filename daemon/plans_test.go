// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"github.com/vishvananda/netlink"

	"signalbox/config"
	"signalbox/explain"
	"signalbox/internal/nstest"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

const servedManifest = `apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.20
  clusterIPs: [10.96.0.20]
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.244.1.10]}]
`

// TestExplainKnowsTheInterfaces: on the node, explain reads the interfaces as the daemon does.
// Elsewhere it knows only the addresses of the Node object.
func TestExplainKnowsTheInterfaces(t *testing.T) {
	nstest.Enter(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "cali0"
	link := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 1, 2, 3).To4(), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	source := t.TempDir()
	manifest := strings.Replace(servedManifest, "port: 80}", "port: 80, nodePort: 30080}", 1)
	manifest = strings.Replace(manifest, "spec:", "spec:\n  type: NodePort", 1)
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	var flags config.Flags
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Add(fs)
	if err := fs.Parse([]string{"--source=" + source, "--hostname-override=node1", "--nodeport-addresses=0.0.0.0/0",
		"--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali"}); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Config()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		from     string
		noDaemon error
		says     string
	}{
		{"10.1.2.9", explain.ErrNoDaemon, "A new TCP connection from Pod 10.1.2.9 goes to the endpoint 10.244.1.10:8080."},
		{"10.1.2.9", nil, "No Service that signalbox serves has 10.1.2.3:30080/tcp."},
	} {
		q, err := explain.ParseQuestion("10.1.2.3:30080", test.from)
		if err != nil {
			t.Fatal(err)
		}
		a, err := Explain(t.Context(), cfg, nil, q, test.noDaemon)
		if err != nil {
			t.Fatal(err)
		}
		var text strings.Builder
		if a.Print(&text); !strings.Contains(text.String(), "\n"+test.says+"\n") {
			t.Errorf("without a daemon (%v):\n%s\nwant %q", test.noDaemon, text.String(), test.says)
		}
	}
}

// TestExplainWithoutDaemon: where no daemon answers, the answer says so. It names the mode that
// has rules in the kernel, and doubts if none has, or if kube-proxy has. Where none was asked, the
// answer is about the objects alone.
func TestExplainWithoutDaemon(t *testing.T) {
	nstest.Enter(t)
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "web.yaml"), []byte(servedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	var flags config.Flags
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.Add(fs)
	if err := fs.Parse([]string{"--source=" + source, "--mode=auto", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16"}); err != nil {
		t.Fatal(err)
	}
	cfg, err := flags.Config()
	if err != nil {
		t.Fatal(err)
	}
	q, err := explain.ParseQuestion("10.96.0.20:80", "")
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, noDaemon error, mode, origin string, verdict explain.Verdict, doubts ...string) {
		t.Helper()
		a, err := Explain(t.Context(), cfg, nil, q, noDaemon)
		if err != nil {
			t.Fatal(err)
		}
		matches := slices.EqualFunc(a.Doubts, doubts, strings.HasPrefix)
		if a.Mode != mode || a.Origin != "manifests of "+source+origin || a.Verdict != verdict || !matches {
			t.Errorf("%s: mode %s, origin %q, verdict %s, doubts %q", what, a.Mode, a.Origin, a.Verdict, a.Doubts)
		}
		asked := noDaemon != nil
		if compared := slices.Contains(a.Problems, "the rules in the kernel are not compared: only a running signalbox does that"); compared != asked || (a.Ports[0].Tracked != nil) != asked {
			t.Errorf("%s: tracked %v, problems %q", what, a.Ports[0].Tracked, a.Problems)
		}
	}
	const nobody = "Nothing says whether the kernel has this (no signalbox of this network namespace answers"
	check("not asked", nil, "nftables", "; no signalbox was asked", explain.Served)
	check("no rules", explain.ErrNoDaemon, "nftables", "; no signalbox answers", explain.Unknown, nobody, "The kernel has no rules of the mode nftables for IPv4")
	plans, err := Plans(t.Context(), cfg, modes.All[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range modes.All {
		if err := m.Supported(plan.IPv4); err != nil {
			t.Logf("not tried: %v", err)
			continue
		}
		p, err := m.New(proxier.Options{Family: plan.IPv4})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Sync(t.Context(), plans[0], plan.Change{All: true}); err != nil {
			t.Fatal(err)
		}
		check("rules of "+m.Name(), explain.ErrNoDaemon, m.Name(), "; no signalbox answers", explain.Unknown, nobody)
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := m.Cleanup(plan.IPv4, false); err != nil {
			t.Fatal(err)
		}
	}
	nstest.NFT(t, "add table ip kube-proxy", "-f", "-")
	check("kube-proxy's rules", explain.ErrNoDaemon, "nftables", "; no signalbox answers", explain.Unknown, nobody,
		"The kernel has no rules of the mode nftables for IPv4", "Rules of another service proxy may be in force for IPv4")
}
