// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"signalbox/internal/measure"
	"signalbox/proxier/plan"
)

// BenchmarkRelay compares ways to an endpoint: straight to it, through the
// relay, and through Debian's haproxy (with splicing) where that is installed,
// which is reached at its own address and, like the relay, at a virtual one. All
// are measured in turns, and the ratios to the straight way reported, because
// the figures themselves are the machine's.
//
// The benchmark runs in a process of its own whose every thread is in the
// network namespace, as a daemon's is.
func BenchmarkRelay(b *testing.B) {
	if os.Getenv(inOwnProcess) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^$", "-test.bench=^BenchmarkRelay$", "-test.benchtime=1x")
		cmd.Env = append(os.Environ(), inOwnProcess+"=yes")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		fmt.Printf("%s", out)
		if err != nil {
			b.Fatal(err)
		}
		return
	}
	for _, c := range []int{1, 64} {
		b.Run(fmt.Sprintf("bulk/connections=%d", c), func(b *testing.B) {
			compare(b, measure.Discard, func(to netip.AddrPort) (float64, error) {
				rate, err := measure.Bulk(measure.Here, to, c, roundTime)
				return rate / 1e6, err
			})
		})
	}
	b.Run("new", func(b *testing.B) {
		compare(b, measure.End, func(to netip.AddrPort) (float64, error) {
			return measure.NewConnections(measure.Here, to, 16, roundTime)
		})
	})
}

// inOwnProcess is set in the environment of the benchmark's own process.
const inOwnProcess = "SIGNALBOX_BENCHMARK_PROCESS"

const (
	// benchRounds is how often the ways take turns; the best round counts, as
	// what disturbs makes a round only slower.
	benchRounds = 5
	roundTime   = 400 * time.Millisecond
)

// compare measures a rate on all ways.
func compare(b *testing.B, handle func(net.Conn), rate func(netip.AddrPort) (float64, error)) {
	w := newWorld(b, plan.IPv4)
	w.listen(0, func(c *net.TCPConn) { handle(c) })
	w.serve(0, 0, 0)
	type way struct {
		name string
		to   netip.AddrPort
		best float64
	}
	ways := []way{{name: "direct", to: w.endpoint(0)}, {name: "relay", to: w.vip(0)}}
	if to, ok := w.haproxy(); ok {
		ways = append(ways, way{name: "haproxy", to: to})
		if w.translate(w.vip(9), to) {
			ways = append(ways, way{name: "haproxy-vip", to: w.vip(9)})
		}
	}
	for b.Loop() {
		for range benchRounds {
			for i := range ways {
				measured, err := rate(ways[i].to)
				w.must(err)
				ways[i].best = max(ways[i].best, measured)
			}
		}
	}
	for _, way := range ways {
		b.ReportMetric(way.best, way.name+"/s")
		if way.name != "direct" {
			b.ReportMetric(way.best/ways[0].best, way.name+"/direct")
		}
	}
	b.ReportMetric(0, "ns/op")
}

// translate makes a virtual address lead somewhere, as for a relay that serves
// a Service. It needs nft.
func (w *world) translate(from, to netip.AddrPort) bool {
	w.t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(`table ip beside {
		chain output {
			type nat hook output priority -100
			ip daddr %s tcp dport %d dnat to %s
		}
	}`, from.Addr(), from.Port(), to))
	w.t.Cleanup(func() { exec.Command("nft", "delete table ip beside").Run() })
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Logf("haproxy is not compared behind a virtual address: %v: %s", err, out)
	}
	return err == nil
}

// haproxy starts one in the world's namespace in front of the endpoint.
func (w *world) haproxy() (netip.AddrPort, bool) {
	w.t.Helper()
	program, err := exec.LookPath("haproxy")
	if err != nil {
		w.t.Log("haproxy is not installed: not compared with it")
		return netip.AddrPort{}, false
	}
	at := netip.AddrPortFrom(w.endpoint(1).Addr(), 9090)
	file := filepath.Join(w.t.TempDir(), "haproxy.cfg")
	w.must(os.WriteFile(file, measure.HAProxyConfig(map[netip.AddrPort]netip.AddrPort{at: w.endpoint(0)}), 0o600))
	var said bytes.Buffer
	cmd := exec.Command(program, "-db", "-f", file)
	cmd.Stdout, cmd.Stderr = &said, &said
	w.must(cmd.Start()) // from this thread, so in its namespace
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	w.await("haproxy: "+said.String(), func() bool {
		c, err := net.Dial("tcp", at.String())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return at, true
}
