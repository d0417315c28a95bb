// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/netlab"
)

// TestHeals: what another program removes from the kernel is there again, without any
// change of a Service, in each mode and family. Packets are IPv4.
func TestHeals(t *testing.T) {
	for variant, damages := range map[string][]string{
		"nftables": {
			"nft flush map ip signalbox frontends", "nft flush chain ip signalbox nat-prerouting",
			"nft delete table ip signalbox", "nft flush ruleset",
			"nft flush chain ip6 signalbox nat-prerouting", "nft delete table ip6 signalbox",
		},
		"userspace": {
			"nft flush map ip signalbox-userspace frontends", "nft flush chain ip signalbox-userspace nat-prerouting",
			"nft delete table ip signalbox-userspace", "nft flush ruleset", "ip rule del priority 83", "ip route flush table 21314",
			"nft delete table ip6 signalbox-userspace", "ip -6 rule del priority 83", "ip -6 route flush table 21314",
		},
		"iptables": {
			"iptables -t nat -F KUBE-SERVICES", "iptables -t nat -F", "iptables -F KUBE-FIREWALL",
			"ip6tables -t nat -F KUBE-SERVICES", "ip6tables -t nat -F",
		},
		"iptables-legacy": {
			"iptables-legacy -t nat -F KUBE-SERVICES", "iptables-legacy -t nat -F", "iptables-legacy -F KUBE-FIREWALL",
			"ip6tables-legacy -t nat -F KUBE-SERVICES", "ip6tables-legacy -t nat -F",
		},
	} {
		t.Run(variant, func(t *testing.T) { heals(t, variant, damages) })
	}
}

func heals(t *testing.T, variant string, damages []string) {
	const metrics = "http://127.0.0.1:10249/metrics"
	lab := newLab(t)
	node, client, pod := lab.Host("node1"), lab.Host("pod-x"), lab.Host("pod-a")
	chooseVariant(t, node, variant)
	log := start(t, node, build(t), "run", "--source", serviceTo(t, pod), "--mode", modeOf(variant), "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16",
		"--conntrack-max-per-core=0", "--conntrack-min=0", "--oom-score-adj=0")
	web := netip.MustParseAddrPort("10.96.0.10:80")
	eventually(t, "the rules are there", func() bool {
		// The writer of a change during a write of either family is not known.
		return log.count("msg=synced family=IPv4") == 1 && log.count("msg=synced family=IPv6") == 1
	})
	if !answers(t, client, web, hangTimeout) {
		t.Fatal("the Service does not answer")
	}
	counted, logged := map[string]int{}, map[string]int{} // by family, and by line of the log
	for _, damage := range damages {
		for _, family := range familiesOf(damage) {
			counted[family]++
			line := fmt.Sprintf("it is repaired\" family=%s process=%s", family, writerOf(damage))
			logged[line]++
		}
		command(t, node, damage)
		for family, n := range counted {
			eventually(t, fmt.Sprintf("after %s, %s has %d repairs", damage, family, n), func() bool {
				return strings.Contains(page(node, metrics), fmt.Sprintf("signalbox_drift_repaired_total{ip_family=%q} %d\n", family, n))
			})
		}
		if !answers(t, client, web, hangTimeout) {
			t.Errorf("after %s, the Service does not answer", damage)
		}
		for line, n := range logged { // the page may be read before the log's last lines
			eventually(t, fmt.Sprintf("after %s, the log has %d times %s", damage, n, line), func() bool { return log.count(line) == n })
		}
	}
}

// familiesOf names the families of which a program removes something.
func familiesOf(damage string) []string {
	switch {
	case damage == "nft flush ruleset":
		return []string{"IPv4", "IPv6"}
	case strings.Contains(damage, " ip6 "), strings.Contains(damage, " -6 "), strings.HasPrefix(damage, "ip6"):
		return []string{"IPv6"}
	}
	return []string{"IPv4"}
}

// writerOf is how the log names the program that did a damage.
func writerOf(damage string) string {
	program, _, _ := strings.Cut(damage, " ")
	if program == "ip" || strings.HasSuffix(program, "-legacy") { // the kernel does not tell
		return "unknown"
	}
	return fmt.Sprintf("\"%s (", program)
}

// modeOf is the mode of a variant.
func modeOf(variant string) string { return strings.TrimSuffix(variant, "-legacy") }

// chooseVariant marks a node as the kubelet does, for the legacy variant of iptables.
func chooseVariant(t *testing.T, on *netlab.Host, variant string) {
	t.Helper()
	if variant == "iptables-legacy" {
		for _, restore := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore"} {
			node{t, on}.must("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n", restore)
		}
	}
}

// TestRepairAfterTakeover: what an earlier signalbox has changed is repaired as soon as it has
// handed over. A program with its name does the damage while it cannot answer.
func TestRepairAfterTakeover(t *testing.T) {
	t.Parallel()
	lab := newLab(t)
	host, client, pod := lab.Host("node1"), lab.Host("pod-x"), lab.Host("pod-a")
	binary, source := build(t), serviceTo(t, pod)
	begin := func() (*os.Process, *heard) {
		p, log := startProcess(t, host, binary, "run", "--source", source, "--mode=nftables", "--hostname-override=node1",
			"--cluster-cidr=10.244.0.0/16", "--conntrack-max-per-core=0", "--conntrack-min=0", "--oom-score-adj=0")
		eventually(t, "both families are served", func() bool { return log.count("level=INFO msg=synced") == 2 })
		return p, log
	}
	earlier, _ := begin()
	eventually(t, "the earlier process has the node lock", func() bool { return page(host, "http://127.0.0.1:10256/healthz") != "" })
	if err := earlier.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := sync.OnceFunc(func() {
		if err := earlier.Signal(syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(resume)
	_, log := begin()
	nft, err := exec.LookPath("nft")
	namesake := filepath.Join(t.TempDir(), filepath.Base(binary))
	if err := errors.Join(err, os.Symlink(nft, namesake)); err != nil {
		t.Fatal(err)
	}
	command(t, host, namesake+" flush map ip signalbox frontends")
	resume()
	resumed := time.Now()
	eventually(t, "the damage is repaired", func() bool { return log.count("it is repaired\" family=IPv4") > 0 })
	if took := time.Since(resumed); took > 10*time.Second {
		t.Errorf("the repair comes %s after the takeover", took)
	}
	if !answers(t, client, netip.MustParseAddrPort("10.96.0.10:80"), hangTimeout) {
		t.Error("the Service does not answer")
	}
}

// command runs a program on a host.
func command(t *testing.T, on *netlab.Host, line string) {
	t.Helper()
	words := strings.Fields(line)
	if err := on.Do(func() error {
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
