package compare

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"

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
		return &tally{answers: map[string]bool{"pod-a": true}, failures: map[string]bool{"refused": true}}
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

// TestAsk needs root: it asks in a small lab without a proxy.
func TestAsk(t *testing.T) {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer lab.Close()
	pod := lab.Host("pod-c").Addr.V4
	probes := []Probe{
		{Client: "pod-x", Network: "tcp", Target: netip.AddrPortFrom(pod, 8080), most: 1},
		{Client: "pod-x", Network: "udp", Target: netip.AddrPortFrom(pod, 8082), most: 1},
	}
	got := askAll(context.Background(), lab, probes, quick)
	if diff := cmp.Diff([]Outcome{{"pod-c 10.244.2.10:8080 sees its client"}, {"refused"}}, got); diff != "" {
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
