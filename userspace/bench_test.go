package userspace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

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
			// In large pieces, or reading at the endpoint is what takes longest.
			drain := func(c *net.TCPConn) {
				for b := make([]byte, 256<<10); ; {
					if _, err := c.Read(b); err != nil {
						break
					}
				}
				c.Close()
			}
			compare(b, drain, func(w *world, to netip.AddrPort) float64 { return w.bulk(to, c) })
		})
	}
	b.Run("new", func(b *testing.B) {
		// Who ends first keeps the connection's ports for a minute. It is the
		// endpoint, or the clients and relays would soon look for free ones
		// more than anything else.
		end := func(c *net.TCPConn) { c.Close() }
		compare(b, end, (*world).newConnections)
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
func compare(b *testing.B, handle func(*net.TCPConn), rate func(*world, netip.AddrPort) float64) {
	w := newWorld(b, plan.IPv4)
	w.listen(0, handle)
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
				ways[i].best = max(ways[i].best, rate(w, ways[i].to))
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

// bulk returns how many megabytes a second so many connections carry.
func (w *world) bulk(to netip.AddrPort, connections int) float64 {
	var group errgroup.Group
	var mu sync.Mutex
	var sent int
	start := time.Now()
	for range connections {
		c, err := net.DialTimeout("tcp", to.String(), hangTimeout)
		w.must(err)
		group.Go(func() error {
			defer c.Close()
			chunk := make([]byte, 256<<10)
			n := 0
			for time.Since(start) < roundTime {
				m, err := c.Write(chunk)
				n += m
				if err != nil {
					return err
				}
			}
			// Bytes count when they have arrived, which the end shows.
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			if _, err := c.Read(chunk); !errors.Is(err, io.EOF) {
				return fmt.Errorf("waiting for the end: %w", err)
			}
			mu.Lock()
			defer mu.Unlock()
			sent += n
			return nil
		})
	}
	w.must(group.Wait())
	return float64(sent) / 1e6 / time.Since(start).Seconds()
}

// newConnections returns how many connections a second 16 clients make and end
// one after the other, once the endpoint's end has come.
func (w *world) newConnections(to netip.AddrPort) float64 {
	const clients = 16
	var group errgroup.Group
	counts := make([]int, clients)
	start := time.Now()
	for i := range clients {
		group.Go(func() error {
			b := make([]byte, 1)
			for time.Since(start) < roundTime {
				c, err := net.DialTimeout("tcp", to.String(), hangTimeout)
				if err != nil {
					return err
				}
				if _, err := c.Read(b); !errors.Is(err, io.EOF) {
					return fmt.Errorf("waiting for the end: %w", err)
				}
				c.Close()
				counts[i]++
			}
			return nil
		})
	}
	w.must(group.Wait())
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / time.Since(start).Seconds()
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
	w.must(os.WriteFile(file, fmt.Appendf(nil, `
global
	maxconn 4000
defaults
	mode tcp
	option splice-auto
	timeout connect 10s
	timeout client 1m
	timeout server 1m
listen web
	bind %s
	server one %s
`, at, w.endpoint(0)), 0o600))
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
