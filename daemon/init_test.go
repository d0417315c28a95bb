// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"signalbox/internal/netlab"
)

// On a node whose /proc/sys cannot be written, everything is served that needs
// no such setting, and the log says what is missing and what to do; --init-only
// in a privileged container is what to do.
func TestReadOnlySysctls(t *testing.T) {
	t.Parallel()
	binary := build(t)
	lab := newLab(t)
	source := serviceTo(t, lab.Host("pod-a"))
	flags := []string{"--mode=iptables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16",
		"--oom-score-adj=0", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0", "--conntrack-udp-timeout=77s"}
	locked := append([]string{"-m", "sh", "-ec", `mount --bind -o ro /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$@"`, "sh", binary}, flags...)

	host := lab.Host("node1")
	log := start(t, host, "unshare", append(locked, "--source="+source)...)
	web := netip.MustParseAddrPort("10.96.0.10:80")
	eventually(t, "the Service answers", func() bool { return answers(t, lab.Host("pod-x"), web, soon) })
	for _, want := range []string{"nf_conntrack_udp_timeout wanted=77", "read-only file system", "route_localnet wanted=1 found=0", "NodePorts are not served on 127.0.0.1", "signalbox --init-only"} {
		eventually(t, "the log says "+want, func() bool { return log.count(want) > 0 })
	}
	d := &daemon{node: node{t, host}}
	d.answers("http://127.0.0.1:10256/livez", 200, `"healthy":true`, `"degraded":["net.ipv4.conf.all.route_localnet","net.netfilter.nf_conntrack_udp_timeout"]`)
	d.answers("http://127.0.0.1:10249/metrics", 200,
		"signalbox_sysctl_problem{sysctl=\"net.ipv4.conf.all.route_localnet\"} 1\n", "signalbox_sysctl_problem{sysctl=\"net.netfilter.nf_conntrack_udp_timeout\"} 1\n")

	if out, err := runOn(host, "unshare", append(locked, "--init-only")...); err == nil || !strings.Contains(out, "nf_conntrack_udp_timeout should be 77") || !strings.Contains(out, "route_localnet") {
		t.Errorf("--init-only without the right to anything: %v\n%s", err, out)
	}
	if out, err := runOn(host, "unshare", append(locked, "--init-only", "--iptables-localhost-nodeports=false")...); err != nil || !strings.Contains(out, "nf_conntrack_udp_timeout should be 77") {
		t.Errorf("--init-only without the right to a setting of connection tracking: %v\n%s", err, out)
	}
	if out, err := runOn(host, binary, append(flags, "--init-only")...); err != nil {
		t.Fatalf("--init-only: %v\n%s", err, out)
	}
	for file, want := range map[string]string{"net/netfilter/nf_conntrack_udp_timeout": "77", "net/ipv4/conf/all/route_localnet": "1"} {
		if out, err := runOn(host, "cat", "/proc/sys/"+file); err != nil || strings.TrimSpace(out) != want {
			t.Errorf("%s is %q, %v; want %s", file, out, err, want)
		}
	}
	if out, err := runOn(host, "unshare", append(locked, "--init-only")...); err != nil {
		t.Errorf("--init-only where everything is done: %v\n%s", err, out)
	}
}

// runOn returns what a program writes on a host.
func runOn(on *netlab.Host, program string, args ...string) (string, error) {
	var out []byte
	err := on.Do(func() (err error) {
		out, err = exec.Command(program, args...).CombinedOutput()
		return err
	})
	return string(out), err
}
