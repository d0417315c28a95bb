// SPDX-License-Identifier: Apache-2.0

//go:build guest

package kubeproxy

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
)

// hangTimeout ends a test that hangs. It is longer than an emulated processor needs.
const hangTimeout = 10 * time.Minute

// The programs under test, which the machine was given.
var (
	signalboxProgram = os.Getenv("SIGNALBOX_VM_SIGNALBOX")
	kubeProxyProgram = os.Getenv("SIGNALBOX_VM_KUBE_PROXY")
)

// TestTakeover hands a node from kube-proxy in ipvs mode to signalbox and back.
// Open connections go on and no new one is lost, whether the old process ends
// before the new one starts or they overlap.
//
// The iptables mode is not among the modes: after its cleanup NodePorts time
// out until kube-proxy writes everything again, as both use the same chains. A
// relay of the userspace mode takes its connections along when it ends.
func TestTakeover(t *testing.T) {
	for _, mode := range []string{"ipvs", "nftables"} {
		for name, overlap := range map[string]bool{"one after the other": false, "overlapping": true} {
			t.Run(mode+"/"+name, func(t *testing.T) {
				t.Parallel()
				handOver(t, mode, overlap)
			})
		}
	}
}

func handOver(t *testing.T, mode string, overlap bool) {
	s := newSite(t)
	old := s.launchKubeProxy()
	s.eventually("kube-proxy serves", s.serves)
	early := s.open()
	lost := s.keepConnecting()

	if !overlap {
		_ = old.Stop(hangTimeout) // kube-proxy lets the signal end it
	}
	next := s.launchSignalbox(mode)
	s.eventually("signalbox takes over", func() error { return says(next, `IPVS servers, addresses and ipsets" family=`) })
	if overlap {
		_ = old.Stop(hangTimeout)
	}
	s.still(early, "the change to signalbox")
	s.must(s.serves())
	late := s.open()

	// kube-proxy starts on an emulated processor for longer than signalbox lets
	// one that served before write, so they cannot overlap on the way back.
	s.must(next.Stop(hangTimeout))
	back := s.launchKubeProxy()
	s.eventually("kube-proxy has its rules", func() error { return says(back, `"syncProxyRules complete" ipFamily="`) })
	s.still(early, "kube-proxy's start")
	s.still(late, "kube-proxy's start")
	if n := lost(); n > 0 {
		t.Errorf("new connections were lost in %d rounds", n)
	}
	s.must(s.run(signalboxProgram, "cleanup"))
	s.must(s.serves())
	// Those to NodePorts that signalbox opened end with its virtual servers.
	s.still(early, "signalbox cleanup")
}

// site is a lab with an API server that node1 reaches.
type site struct {
	*testing.T
	lab *netlab.Lab
	url string
	dir string // where the plain names of the iptables tools are
}

func newSite(t *testing.T) *site {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lab.Close() })
	l, err := lab.Host("node1").Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: newAPI(lab)}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	s := &site{T: t, lab: lab, url: "http://" + l.Addr().String(), dir: t.TempDir()}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(family + "-nft" + tool)
			s.must(err)
			s.must(os.Symlink(path, filepath.Join(s.dir, family+tool)))
		}
	}
	return s
}

func (s *site) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// launch starts a program on node1; its log is shown if the test fails.
func (s *site) launch(path string, args ...string) *cluster.Process {
	s.Helper()
	args = append(args, "--master", s.url, "--hostname-override", "node1",
		"--cluster-cidr", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String(), "-v", "4")
	p, err := cluster.StartProcess(s.command(path, args...), filepath.Join(s.TempDir(), "log"), s.lab.Host("node1").Do)
	s.must(err)
	s.Cleanup(func() {
		p.Kill()
		if s.Failed() {
			s.Logf("%s said:\n%s", path, p.Tail(60))
		}
	})
	return p
}

func (s *site) command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "PATH="+s.dir+":"+os.Getenv("PATH"))
	return cmd
}

func (s *site) launchSignalbox(mode string) *cluster.Process {
	s.Helper()
	return s.launch(signalboxProgram, "--mode", mode)
}

// launchKubeProxy leaves kernel settings alone that a network namespace may not
// change.
func (s *site) launchKubeProxy() *cluster.Process {
	s.Helper()
	return s.launch(kubeProxyProgram, "--proxy-mode", "ipvs", "--detect-local-mode", "ClusterCIDR",
		"--conntrack-max-per-core", "0", "--conntrack-min", "0", "--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0",
		"--oom-score-adj", "0")
}

// run runs a program on node1 to its end.
func (s *site) run(path string, args ...string) error {
	return s.lab.Host("node1").Do(func() error {
		if out, err := s.command(path, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", path, err, out)
		}
		return nil
	})
}

// says wants a line of a program's log about each family.
func says(p *cluster.Process, text string) error {
	for _, family := range []string{"IPv4", "IPv6"} {
		if !strings.Contains(p.Log(), text+family) {
			return fmt.Errorf("no %s%s in\n%s", text, family, p.Tail(10))
		}
	}
	return nil
}

// eventually waits until check has nothing to say any more.
func (s *site) eventually(what string, check func() error) {
	s.Helper()
	var last error
	err := wait.PollUntilContextTimeout(s.Context(), 100*time.Millisecond, hangTimeout, true, func(context.Context) (bool, error) {
		last = check()
		return last == nil, nil
	})
	if err != nil {
		s.Fatalf("%s: %v; last seen: %v", what, err, last)
	}
}

// way is how a client reaches the Service.
type way struct {
	from   string
	target netip.AddrPort
}

// ways are cluster IPs and NodePorts in both families, from inside the cluster
// and from outside.
func (s *site) ways() []way {
	var all []way
	node := s.lab.Host("node1").Addr
	for i, address := range []netip.Addr{node.V4, node.V6} {
		clusterIP := netip.AddrPortFrom(netip.MustParseAddr(clusterIPs[i]), port)
		all = append(all, way{"pod-x", clusterIP}, way{"node1", clusterIP}, way{"client1", netip.AddrPortFrom(address, nodePort)})
	}
	return all
}

// ask is patient with an emulated processor.
func ask[T any](ctx context.Context, do func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return do(ctx)
}

// serves says what is wrong with a new connection on one of the ways.
func (s *site) serves() error {
	for _, w := range s.ways() {
		_, err := ask(s.Context(), func(ctx context.Context) (netlab.Answer, error) {
			return s.lab.Host(w.from).Ask(ctx, "tcp", netip.AddrPort{}, w.target)
		})
		if err != nil {
			return fmt.Errorf("from %s to %s: %w", w.from, w.target, err)
		}
	}
	return nil
}

// open opens a connection on each way of others. In one run of fourteen the
// node's own to a cluster IP, over IPv6, was reset by the change to signalbox.
func (s *site) open() []*netlab.Conn {
	s.Helper()
	var conns []*netlab.Conn
	for _, w := range s.ways() {
		if w.from == "node1" {
			continue
		}
		c, err := ask(s.Context(), func(ctx context.Context) (*netlab.Conn, error) {
			return s.lab.Host(w.from).Open(ctx, "tcp", netip.AddrPort{}, w.target)
		})
		if err != nil {
			s.Fatalf("from %s to %s: %v", w.from, w.target, err)
		}
		s.Cleanup(func() { c.Close() })
		conns = append(conns, c)
	}
	return conns
}

// still wants an answer on each connection.
func (s *site) still(conns []*netlab.Conn, after string) {
	s.Helper()
	for _, c := range conns {
		if _, err := ask(s.Context(), c.Ask); err != nil {
			s.Errorf("after %s, the connection from %s: %v", after, c.Local(), err)
		}
	}
}

// keepConnecting makes new connections until lost is called, which returns how
// many rounds of them had one without an answer.
func (s *site) keepConnecting() (lost func() int) {
	stop, failures := make(chan struct{}), make(chan int, 1)
	go func() {
		n := 0
		defer func() { failures <- n }()
		round := time.NewTicker(500 * time.Millisecond)
		defer round.Stop()
		for {
			select {
			case <-stop:
				return
			case <-round.C:
			}
			if err := s.serves(); err != nil {
				s.Log(err)
				n++
			}
		}
	}()
	lost = sync.OnceValue(func() int {
		close(stop)
		return <-failures
	})
	s.Cleanup(func() { lost() }) // the log is the test's
	return lost
}
