// SPDX-License-Identifier: Apache-2.0

package conformance_test

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"signalbox/conntrack"
	"signalbox/internal/netlab"
	"signalbox/iptables"
	"signalbox/ipvs"
	"signalbox/nftables"
	"signalbox/proxier"
	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
	"signalbox/userspace"
)

// TestMain lets more scenarios run at a time than there are processors: they
// mostly wait for what must not happen.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		if err := f.Value.Set(strconv.Itoa(4 * runtime.GOMAXPROCS(0))); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func TestReference(t *testing.T) {
	conformance.Run(t, conformance.Mode{
		Name:          "nftables-reference",
		New:           newReference,
		Supported:     func(plan.Family) error { return nil },
		Flows:         cleanFlows,
		DropForwarded: dropForwardedUnlessDNATed,
		Dump:          dumpNFT,

		LocalhostNodePorts: service.LocalhostNamed,
	})
}

func TestIPTables(t *testing.T) {
	for _, backend := range []iptables.Backend{iptables.Legacy, iptables.NFT} {
		t.Run(string(backend), func(t *testing.T) {
			tuning := iptables.Tuning{Backend: backend, Logger: slog.New(slog.DiscardHandler)}
			conformance.Run(t, conformance.Mode{
				Name: iptables.Mode + "-" + string(backend),
				New:  func(o proxier.Options) (proxier.Proxier, error) { return iptables.New(o, tuning) },
				Supported: func(f plan.Family) error {
					_, err := iptables.New(proxier.Options{Family: f}, tuning)
					return err
				},
				LocalhostNodePorts: service.LocalhostCovered,
				Flows:              cleanFlows,
				DropForwarded:      func(f plan.Family) error { return run(iptablesCommand(f, backend), "-P", "FORWARD", "DROP") },
				Dump:               func(f plan.Family) string { return dumpIPTables(f, backend) },
			})
		})
	}
}

func iptablesCommand(f plan.Family, backend iptables.Backend) string {
	return map[plan.Family]string{plan.IPv4: "iptables-", plan.IPv6: "ip6tables-"}[f] + string(backend)
}

func run(command string, args ...string) error {
	if out, err := exec.Command(command, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", command, args, err, out)
	}
	return nil
}

// dropForwarded is a firewall in a table of its own: no other table can accept
// what it drops.
func dropForwarded(f plan.Family) error {
	return run("nft", "table", nftFamily(f), "firewall", "{ chain forward { type filter hook forward priority 0; policy drop; }; }")
}

// dropForwardedUnlessDNATed is what docs/compatibility.md tells users to set up
// in the modes that accept nothing themselves.
func dropForwardedUnlessDNATed(f plan.Family) error {
	command := iptablesCommand(f, iptables.NFT)
	return errors.Join(run(command, "-P", "FORWARD", "DROP"),
		run(command, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "DNAT,RELATED,ESTABLISHED", "-j", "ACCEPT"))
}

func nftFamily(f plan.Family) string {
	return map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[f]
}

func dumpIPTables(f plan.Family, backend iptables.Backend) string {
	out, err := exec.Command(iptablesCommand(f, backend) + "-save").CombinedOutput()
	if err != nil {
		return err.Error() + ": " + string(out)
	}
	return string(out)
}

func TestNFTables(t *testing.T) { conformance.Run(t, nftablesMode) }

var nftablesMode = conformance.Mode{
	Name:          nftables.Mode,
	New:           func(o proxier.Options) (proxier.Proxier, error) { return nftables.New(o) },
	Supported:     nftables.Dataplane{}.Supported,
	Flows:         cleanFlows,
	DropForwarded: dropForwardedUnlessDNATed,
	Dump:          dumpNFT,

	LocalhostNodePorts: service.LocalhostNamed,
}

func TestUserspace(t *testing.T) { conformance.Run(t, userspaceMode) }

var userspaceMode = conformance.Mode{
	Name:      userspace.Mode,
	New:       func(o proxier.Options) (proxier.Proxier, error) { return userspace.New(o) },
	Supported: userspace.Dataplane{}.Supported,

	KnownProblem:       "does not relay SCTP",
	LocalhostNodePorts: service.LocalhostNamed,
	Flows: func(localAddrs func() ([]netip.Addr, error)) (conformance.Flows, error) {
		return conntrack.New(conntrack.Options{LocalAddrs: localAddrs, Relays: userspace.RelayPrefixes()})
	},
	DropForwarded: dropForwarded,
	Dump:          dumpNFT,
	// An answer between two Pods on a bridge, or from the node itself to
	// a Pod, cannot be taken in on its way to the client.
	NodeSource: func(link netlab.PodLink, client, server string) bool {
		return strings.HasPrefix(client, "pod-") && (server == "node1" || link == netlab.Bridged && strings.HasPrefix(server, "pod-"))
	},
}

func TestIPVS(t *testing.T) { conformance.Run(t, ipvsMode) }

var ipvsMode = conformance.Mode{
	Name:          ipvs.Mode,
	New:           func(o proxier.Options) (proxier.Proxier, error) { return ipvs.New(o) },
	Supported:     ipvs.Dataplane{}.Supported,
	HasSchedulers: true,
	Flows:         cleanFlows,
	DropForwarded: dropForwardedUnlessDNATed,
	Dump: func(f plan.Family) string {
		text := dumpNFT(f)
		for _, file := range []string{"ip_vs", "ip_vs_conn"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			text += fmt.Sprintf("\n%s: %s (%v)", file, b, err)
		}
		return text
	},
}

func cleanFlows(localAddrs func() ([]netip.Addr, error)) (conformance.Flows, error) {
	return conntrack.New(conntrack.Options{LocalAddrs: localAddrs})
}

// dumpNFT is read by people only; without nft on the machine they see why it
// is missing.
func dumpNFT(family plan.Family) string {
	out, err := exec.Command("nft", "list", "ruleset", nftFamily(family)).CombinedOutput()
	if err != nil {
		return err.Error() + ": " + string(out)
	}
	return string(out)
}
