// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/netlab"
)

// neighbours are rules of the kinds that Docker, flannel, Calico, a CNI's
// portmap and the kubelet have on a node.
const neighbours = `*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:cali-PREROUTING - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
COMMIT
*nat
:DOCKER - [0:0]
:FLANNEL-POSTRTG - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT ! -d LOOPBACK -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s OUTSIDE ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination TARGET
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
COMMIT
*filter
:DOCKER-USER - [0:0]
:FLANNEL-FWD - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j DOCKER-USER
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FORWARD -m comment --comment "kubernetes service portals" -j ACCEPT
-A OUTPUT -j KUBE-FIREWALL
-A DOCKER-USER -j RETURN
COMMIT
`

const neighbourTables = `table inet firewalld { chain filter_INPUT { type filter hook input priority 10; ct state established accept; }; }
table ip kube-router { set kube-proxy { type ipv4_addr; elements = { 10.96.0.10 }; }; }
`

func neighboursOf(v6 bool) string {
	if v6 {
		return strings.NewReplacer("LOOPBACK", "::1/128", "OUTSIDE", "fd00:17::/64", "TARGET", "[fd00:17::2]:80").Replace(neighbours)
	}
	const localnet = ` -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP`
	text := strings.Replace(neighbours, "-A DOCKER-USER", "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8"+localnet+"\n-A DOCKER-USER", 1)
	return strings.NewReplacer("LOOPBACK", "127.0.0.0/8", "OUTSIDE", "172.17.0.0/16", "TARGET", "172.17.0.2:80").Replace(text)
}

// node runs programs on a lab's node1.
type node struct {
	*testing.T
	host *netlab.Host
}

func (n node) run(stdin string, command ...string) (string, error) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.host.Do(cmd.Run)
	return out.String(), err
}

func (n node) must(stdin string, command ...string) string {
	n.Helper()
	out, err := n.run(stdin, command...)
	if err != nil {
		n.Fatalf("%q: %v: %s", command, err, out)
	}
	return out
}

var changing = regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]|counter packets \d+ bytes \d+`)

// rules is the text of every rule on the node, without dates and counters.
func (n node) rules() string {
	n.Helper()
	var all strings.Builder
	for _, command := range []string{"iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save", "nft list ruleset"} {
		all.WriteString("# " + command + "\n" + n.must("", strings.Fields(command)...))
	}
	return changing.ReplaceAllString(all.String(), "")
}

// Whatever modes ran on a node, cleanup leaves the rules that were there
// before, byte for byte.
func TestCleanupCommand(t *testing.T) {
	t.Parallel()
	binary, source := build(t), manifests(t)
	lab := newLab(t)
	n := node{t, lab.Host("node1")}
	for _, tool := range []string{"legacy", "nft"} {
		n.must(neighboursOf(false), "iptables-"+tool+"-restore")
		n.must(neighboursOf(true), "ip6tables-"+tool+"-restore")
	}
	n.must(neighbourTables, "nft", "-f", "-")
	before := n.rules()
	for _, mode := range []string{"iptables", "nftables"} {
		cmd := exec.Command(binary, "run", "--source", source, "--mode", mode, "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16")
		cmd.Stderr = t.Output()
		if err := n.host.Start(cmd); err != nil {
			t.Fatal(err)
		}
		sign := map[string]string{"iptables": "-j KUBE-SVC-", "nftables": "table ip6 signalbox"}[mode]
		eventually(t, "rules of mode "+mode, func() bool { return strings.Contains(n.rules(), sign) })
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
	}
	if said := n.must("", binary, "cleanup"); !strings.Contains(said, "removed what signalbox's mode nftables wrote, for IPv4\nremoved what signalbox's mode nftables wrote, for IPv6\n") {
		t.Errorf("cleanup says %q", said)
	}
	if diff := cmp.Diff(before, n.rules()); diff != "" {
		t.Errorf("(-before +after cleanup)\n%s", diff)
	}

	// kube-proxy's go only where that is asked for.
	n.must("*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n*nat\n:KUBE-SERVICES - [0:0]\n-I PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\nCOMMIT\n",
		"iptables-legacy-restore", "--noflush")
	n.must("table ip6 kube-proxy { chain services { }; }\n", "nft", "-f", "-")
	with := n.rules()
	if said := n.must("", binary, "cleanup"); said != "nothing of signalbox was there\n" {
		t.Errorf("cleanup where all is kube-proxy's says %q", said)
	}
	if diff := cmp.Diff(with, n.rules()); diff != "" {
		t.Errorf("cleanup changed what is kube-proxy's (-before +after)\n%s", diff)
	}
	if said := n.must("", binary, "cleanup", "--kube-proxy"); said != "removed kube-proxy's iptables rules, for IPv4\nremoved kube-proxy's nftables table, for IPv6\n" {
		t.Errorf("cleanup --kube-proxy says %q", said)
	}
	if said := n.must("", binary, "cleanup", "--kube-proxy"); said != "nothing of signalbox or kube-proxy was there\n" {
		t.Errorf("cleanup --kube-proxy where nothing is says %q", said)
	}
	if diff := cmp.Diff(before, n.rules()); diff != "" {
		t.Errorf("(-before +after cleanup --kube-proxy)\n%s", diff)
	}
}

// A process that was killed while it wrote its first rules leaves nothing that cleanup
// does not know.
func TestCleanupAfterKill(t *testing.T) {
	t.Parallel()
	binary, source := build(t), manifests(t)
	n := node{t, newLab(t).Host("node1")}
	for _, tool := range []string{"legacy", "nft"} {
		n.must(neighboursOf(false), "iptables-"+tool+"-restore")
		n.must(neighboursOf(true), "ip6tables-"+tool+"-restore")
	}
	before := n.rules()
	// What it writes first, in the order in which it appears.
	for _, sign := range []string{":KUBE-SVC-PROBE", ":KUBE-EXTERNAL-SERVICES", "-j KUBE-SERVICES", "-j KUBE-MARK-MASQ"} {
		cmd := exec.Command(binary, "run", "--source", source, "--mode", "iptables", "--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16")
		if err := n.host.Start(cmd); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(hangTimeout); !strings.Contains(n.must("", "iptables-nft-save"), sign); {
			if time.Now().After(end) {
				t.Fatalf("the process never wrote %s", sign)
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		// A tool that the process started may still write.
		eventually(t, "no iptables tool of the killed process", func() bool {
			return n.must("", binary, "cleanup") == "nothing of signalbox was there\n"
		})
		if diff := cmp.Diff(before, n.rules()); diff != "" {
			t.Fatalf("killed after %s appeared (-before +after cleanup)\n%s", sign, diff)
		}
	}
}

// A removal that fails is named, the others are done, and the exit code says
// so.
func TestCleanupCommandFails(t *testing.T) {
	t.Parallel()
	binary := build(t)
	lab := newLab(t)
	n := node{t, lab.Host("node1")}
	n.must("table ip signalbox { chain nat { }; }\ntable ip kube-proxy { chain nat { }; }\n", "nft", "-f", "-")
	// Without the right to change anything.
	out, err := n.run("", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--ambient-caps=-net_admin", binary, "cleanup", "--kube-proxy")
	if err == nil {
		t.Errorf("the exit code is 0, the output %s", out)
	}
	for _, what := range []string{"signalbox's mode nftables", "kube-proxy's nftables table"} {
		if !strings.Contains(out, what) {
			t.Errorf("%q is not named in\n%s", what, out)
		}
	}
}

// hideTools runs a command where no iptables is to be found.
var hideTools = []string{"unshare", "-m", "sh", "-ec", `mount -t tmpfs none /usr/sbin; mount -t tmpfs none /sbin; exec env PATH=/nowhere "$@"`, "sh"}

// Without the tools nobody can tell whose chains are there, and that is said
// once of each family, with what to do; neither of the two is blamed.
func TestUnknownChains(t *testing.T) {
	t.Parallel()
	binary, source := build(t), manifests(t)
	lab := newLab(t)
	n := node{t, lab.Host("node1")}
	n.must("*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\nCOMMIT\n", "iptables-nft-restore")
	for _, args := range [][]string{{"cleanup"}, {"cleanup", "--kube-proxy"}} {
		said, err := n.run("", slices.Concat(hideTools, []string{binary}, args)...)
		const want = "signalbox: cleanup is not complete:\nthe kernel has iptables rules for Services of IPv4 (nft, chain KUBE-SERVICES), and without the program iptables nobody can tell whether signalbox or kube-proxy wrote them, nor remove them: use the image signalbox-iptables, "
		if err == nil || !strings.HasPrefix(said, want) || strings.Count(said, "\n") != 2 {
			t.Errorf("%v: %v\n%s\nwant\n%s", args, err, said, want)
		}
	}
	run := slices.Concat(hideTools[1:], []string{binary, "run", "--source", source, "--mode", "nftables", "--hostname-override", "node1",
		"--cluster-cidr", "10.244.0.0/16"})
	log := start(t, n.host, hideTools[0], run...)
	// What others wrote was tried, all of it.
	(&daemon{node: n}).answers("http://127.0.0.1:10249/metrics", 200, "signalbox_foreign_rules{ip_family=\"IPv4\"} 1\n")
	if many := log.count("nobody can tell whether"); many != 1 {
		t.Errorf("%d warnings about the same chains, want one", many)
	}
}

// A node without the tools is told of each missing program once.
func TestWithoutTools(t *testing.T) {
	t.Parallel()
	binary, source := build(t), manifests(t)
	lab := newLab(t)
	said, err := node{t, lab.Host("node1")}.run("", slices.Concat(hideTools, []string{binary, "run", "--source", source, "--mode", "iptables",
		"--hostname-override", "node1", "--cluster-cidr", "10.244.0.0/16"})...)
	const want = "signalbox: no mode works on this machine: " +
		"mode iptables cannot serve IPv4: program iptables is missing; install the package iptables, or use the image signalbox-iptables\n" +
		"mode iptables cannot serve IPv6: program ip6tables is missing; install the package iptables, or use the image signalbox-iptables\n"
	if err == nil || !strings.HasSuffix(said, want) {
		t.Errorf("%v\n%s\nwant\n%s", err, said, want)
	}
}
