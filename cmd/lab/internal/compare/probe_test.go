// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/netlab"
)

// small is a NodePort Service that becomes a ClusterIP Service.
func small() Case {
	service := func(spec corev1.ServiceSpec) State {
		return State{Service: &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: "small", Namespace: "default", Annotations: map[string]string{probeAnnotation: "192.0.2.77 31000 10.96.0.9"}},
			Spec:       spec,
		}}
	}
	port := corev1.ServicePort{Port: 80, NodePort: 30080}
	first := service(corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, ClusterIPs: []string{"10.96.0.9"}, Ports: []corev1.ServicePort{port}})
	port.NodePort = 0
	return Case{Name: "small", States: []State{first, service(corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.9"}, Ports: []corev1.ServicePort{port}})}}
}

// TestHealthCheckProbes: a health check node port is asked while the Service has it, and
// when it has it no more.
func TestHealthCheckProbes(t *testing.T) {
	c := small()
	c.States[0].Service.Spec.HealthCheckNodePort = 30082
	for n, want := range []string{ofHealth, ofNothing} {
		found := false
		for _, p := range c.probes(n) {
			if p.Target.Port() != 30082 {
				continue
			}
			found = true
			if p.Network != healthNetwork || p.Frontend != want || p.most != 1 {
				t.Errorf("state %d: %s over %s, of %d, want %s", n, p, p.Network, p.most, want)
			}
		}
		if !found {
			t.Errorf("state %d: no probe", n)
		}
	}
}

// TestProbes: every state is probed at all that the Service has in any, at what the
// annotation names, and at an unused port.
func TestProbes(t *testing.T) {
	for n, nodePort := range []string{ofNodePort, ofNothing} {
		got := map[string]string{}
		for _, p := range small().probes(n) {
			if p.Client == "node1" || p.Client == "pod-x" && !strings.Contains(p.Target.String(), "31000") {
				got[fmt.Sprintf("%s %s %s", p.Client, p.Network, p.Target)] = p.Frontend
			}
		}
		for probe, kind := range map[string]string{
			"pod-x tcp 10.96.0.9:80": ofClusterIP, "pod-x udp 10.96.0.9:80": ofNothing, "pod-x tcp 10.96.0.9:9": ofNothing,
			"pod-x tcp 172.18.0.11:30080": nodePort, "node1 udp 172.18.0.11:30080": ofNothing, "node1 tcp [fd00:172:18::b]:30080": nodePort,
			"node1 tcp 127.0.0.1:30080": nodePort, "pod-x tcp 10.244.1.1:30080": nodePort,
			"pod-x tcp 192.0.2.77:80": ofNothing, "node1 tcp 172.18.0.11:31000": ofNothing,
		} {
			if got[probe] != kind {
				t.Errorf("state %d, %s: %q, want %q", n, probe, got[probe], kind)
			}
		}
	}
}

// TestSticky: each client of a Service with affinity is compared by the number of
// endpoints, but for clients with many addresses.
func TestSticky(t *testing.T) {
	answered := func() *tally {
		all := newTally()
		all.answers["pod-a"], all.failures["refused"] = true, true
		return all
	}
	p := Probe{sticky: true}
	if got, want := answered().outcome(p, false).String(), "one endpoint answers, refused"; got != want {
		t.Errorf("one address: %q, want %q", got, want)
	}
	moved := answered()
	moved.moved = true
	if got, want := moved.outcome(p, true).String(), "a client changes its endpoint, pod-a, refused"; got != want {
		t.Errorf("many addresses: %q, want %q", got, want)
	}
	if n := len(quick.sources(Probe{Client: "client1", Network: "tcp", sticky: true, Target: netip.MustParseAddrPort("[fd00::1]:80")})); n != sourcesPerRound {
		t.Errorf("client1 has %d addresses, want %d", n, sourcesPerRound)
	}
	if n := len(quick.sources(Probe{Client: "pod-x", Network: "tcp", sticky: true})); n != 1 {
		t.Errorf("pod-x has %d addresses, want one", n)
	}
}

// TestPlan: with affinity, the first connection of a source address goes alone.
func TestPlan(t *testing.T) {
	at := netip.MustParseAddrPort("10.96.0.9:80")
	for _, c := range []struct {
		name   string
		effort effort
		probe  Probe
		want   string
	}{
		{"quick, no endpoint", quick, Probe{}, "[1 1]"},
		{"quick, two endpoints", quick, Probe{most: 2}, "[3 5]"},
		{"careful, one endpoint", careful, Probe{most: 1}, "[16]"},
		{"careful, four endpoints", careful, Probe{most: 4}, "[38]"},
		{"affinity", quick, Probe{Client: "pod-x", most: 2, sticky: true}, "[1 3 5]"},
		{"affinity, many addresses", quick, Probe{Client: "client1", Target: at, most: 2, sticky: true}, "[24 24]"},
	} {
		var sizes []int
		for _, wave := range c.effort.plan(c.probe) {
			sizes = append(sizes, len(wave))
		}
		if got := fmt.Sprint(sizes); got != c.want {
			t.Errorf("%s: waves of %s tries, want %s", c.name, got, c.want)
		}
	}
}

// TestComplete: a probe ends when all endpoints have answered, or in the quick round when
// nobody has.
func TestComplete(t *testing.T) {
	second := careful
	second.round = 1
	one, two := netip.MustParseAddrPort("10.244.1.10:8080"), netip.MustParseAddrPort("10.244.1.11:8080")
	for _, c := range []struct {
		name    string
		probe   Probe
		effort  effort
		servers []netip.AddrPort
		err     error
		want    bool
	}{
		{"nobody answers, quick", Probe{most: 2}, quick, nil, syscall.ECONNREFUSED, true},
		{"nobody answers, careful", Probe{most: 2}, second, nil, syscall.ECONNREFUSED, false},
		{"one of two answers", Probe{most: 2}, quick, []netip.AddrPort{one}, nil, false},
		{"both answer", Probe{most: 2}, quick, []netip.AddrPort{one, two}, nil, true},
		{"both answer, and a try fails", Probe{most: 2}, quick, []netip.AddrPort{one, two}, syscall.ECONNREFUSED, false},
		{"both answer, with affinity", Probe{most: 2, sticky: true}, quick, []netip.AddrPort{one, two}, nil, false},
	} {
		seen := newTally()
		for _, at := range c.servers {
			seen.add(netip.AddrPort{}, at.String(), at, nil)
		}
		if c.err != nil {
			seen.add(netip.AddrPort{}, "", netip.AddrPort{}, c.err)
		}
		if got := seen.complete(c.probe, c.effort); got != c.want {
			t.Errorf("%s: complete is %v", c.name, got)
		}
	}
}

// TestControl: what is asked now proves nothing about a question that came before.
func TestControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &control{next: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		asked, answer := make(chan struct{}), make(chan error)
		go c.run(ctx, func() error {
			asked <- struct{}{}
			return <-answer
		})
		<-asked
		later := c.later()
		isClosed := func() bool {
			synctest.Wait()
			select {
			case <-later:
				return true
			default:
				return false
			}
		}
		answer <- nil
		if isClosed() {
			t.Error("a connection that had begun before counts")
		}
		<-asked
		answer <- errors.New("lost")
		if isClosed() {
			t.Error("a connection without an answer counts")
		}
		<-asked
		answer <- nil
		if !isClosed() {
			t.Error("a connection that began later does not count")
		}
		cancel()
	})
}

// TestAsk needs root: it asks in a small lab without a proxy.
func TestAsk(t *testing.T) {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	pod, node := lab.Host("pod-c").Addr.V4, lab.Host("node1").Addr.V4
	health, err := lab.Host("node1").Listen("tcp", netip.AddrPortFrom(node, 30002).String())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", "2")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, "{ \"localEndpoints\":\n 2 }")
	})}
	go server.Serve(health)
	defer server.Close()
	// Whoever asks the Pod's port 8081 gets no answer.
	if err := lab.Host("pod-c").Do(func() error {
		return exec.Command("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; }; add rule ip t c tcp dport 8081 drop").Run()
	}); err != nil {
		t.Fatal(err)
	}
	probes := []Probe{
		{Client: "pod-x", Network: "tcp", Target: netip.AddrPortFrom(pod, 8080), most: 1},
		{Client: "pod-x", Network: "tcp", Target: netip.AddrPortFrom(pod, 8081), most: 1},
		{Client: "pod-x", Network: "udp", Target: netip.AddrPortFrom(pod, 8082), most: 1},
		{Client: "client1", Network: healthNetwork, Target: netip.AddrPortFrom(node, 30002), most: 1},
		{Client: "client1", Network: healthNetwork, Target: netip.AddrPortFrom(node, 30003), most: 1},
	}
	asker := newAsker(lab)
	defer asker.close()
	got := asker.askAll(t.Context(), probes, quick)
	want := []Outcome{
		{"pod-c 10.244.2.10:8080 sees its client"}, {"silent"}, {"refused"},
		{`HTTP 503, weight 2, {"localEndpoints":2}`}, {"refused"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

func TestReport(t *testing.T) {
	r := Report{Cases: 1, Probes: 7, Fleeting: 1}
	rule := &Rule{KubeProxy: "drops", Signalbox: "refuses", Reason: "It is faster."}
	at := netip.MustParseAddrPort("10.96.0.9:80")
	add := func(client string, rule *Rule) {
		r.add(Difference{Case: small(), Probe: Probe{Client: client, Network: "tcp", Target: at, Frontend: ofClusterIP},
			KubeProxy: Outcome{"silent"}, Signalbox: Outcome{"refused"}, Rule: rule})
	}
	add("pod-x", nil)
	add("pod-a", nil)
	add("node1", rule)
	var b strings.Builder
	if err := r.write(&b, Config{Mode: "nftables", KubeProxyMode: "nftables", Cases: []Case{small()}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"signalbox (nftables) beside kube-proxy (nftables), 1 of 1 cases: 7 probes, 1 deliberate differences, 2 others, 1 seen once\n",
		"1 times: kube-proxy: drops; signalbox: refuses.\n  Reason: It is faster.\n",
		"== small\nin state 0, kube-proxy: silent; signalbox: refused\n" +
			"  pod-x to tcp 10.96.0.9:80 (cluster IP)\n  pod-a to tcp 10.96.0.9:80 (cluster IP)\n--- # state 0\n",
		"nodePort: 30080",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

// TestFailingCaseIsWritten: finish writes a file that --replay can read, and fails.
func TestFailingCaseIsWritten(t *testing.T) {
	c := comparison{cfg: Config{Mode: "nftables", OutDir: t.TempDir()}}
	if err := c.finish(io.Discard); err != nil {
		t.Errorf("no difference is an error: %v", err)
	}
	c.report.add(Difference{Case: small()})
	err := c.finish(io.Discard)
	if err == nil || !strings.Contains(err.Error(), "compare-nftables-small.yaml") {
		t.Errorf("got the error %v, want one that names the file", err)
	}
}
