// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
	"signalbox/internal/wait"
	"signalbox/modes"
	"signalbox/proxier/plan"
)

const (
	// killsPerRun is how often TestKilled kills in each mode. `make soak` repeats the
	// test for 1,000 kills.
	killsPerRun = 5
	// killedServices change all the time.
	killedServices = 12
)

// TestKilled: signalbox is killed at random moments while Services change. After each
// restart, each Service leads to its endpoints and to no other. In the end the kernel has
// as many rules as a node whose signalbox was never killed. In kernel modes, connections
// go on and new ones are made at any moment. A relay ends with its process.
func TestKilled(t *testing.T) {
	for _, variant := range []string{"nftables", "iptables", "iptables-legacy", "ipvs", "userspace"} {
		t.Run(variant, func(t *testing.T) {
			k := newKilledNode(t, variant)
			chooseVariant(t, k.lab.Host("node1"), variant)
			k.publish("steady", 0, "pod-a", "pod-c")
			// nftables mode keeps some chains for numbers of endpoints that no Service has any more.
			k.publish("steady-one", killedServices+1, "pod-a")
			k.publish("steady-three", killedServices+2, "pod-a", "pod-b", "pod-c")
			for i := range killedServices {
				k.change(i)
			}
			k.startAndCheck()
			endLoad := func() {}
			if variant != "userspace" {
				endLoad = k.load()
			}
			for range killsPerRun {
				k.killAgain()
			}
			endLoad()
			k.compareWithFreshNode()
			k.kill()
		})
	}
}

// killedNode is a lab whose node1 runs signalbox with a directory of manifests.
type killedNode struct {
	*testing.T
	lab     *netlab.Lab
	dir     *testbed.Directory
	binary  string
	variant string
	random  *rand.Rand
	// endpoints of each Service, by number.
	endpoints [killedServices][]string

	cmd *exec.Cmd
	log *heard
}

func newKilledNode(t *testing.T, variant string) *killedNode {
	dir, err := testbed.NewDirectory(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	k := &killedNode{T: t, lab: newLab(t), dir: dir, binary: build(t), variant: variant, random: rand.New(rand.NewPCG(seed, 1))}
	mode, err := modes.Named(modeOf(k.variant))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.lab.Host("node1").Do(func() error { return mode.Supported(plan.IPv4) }); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if k.cmd != nil {
			k.kill()
		}
		if t.Failed() && k.log != nil {
			t.Logf("the last process logged:\n%s", k.log.text.String())
		}
	})
	return k
}

// launch starts signalbox on a host.
func (k *killedNode) launch(on *netlab.Host, flags ...string) (*exec.Cmd, *heard) {
	k.Helper()
	log := &heard{}
	cmd := exec.Command(k.binary, append(flags, "run", "--source", k.dir.Path, "--mode", modeOf(k.variant), "--hostname-override", "node1",
		"--cluster-cidr", netlab.PodNetwork.V4.String()+","+netlab.PodNetwork.V6.String(), "--conntrack-max-per-core=0", "--oom-score-adj=0")...)
	cmd.Stderr = log
	if err := on.Start(cmd); err != nil {
		k.Fatal(err)
	}
	return cmd, log
}

func (k *killedNode) kill() {
	k.Helper()
	if err := k.cmd.Process.Kill(); err != nil {
		k.Fatal(err)
	}
	_ = k.cmd.Wait() // "signal: killed"
	k.cmd = nil
}

// killAgain kills signalbox while Services change: before its first sync, in it, or later.
// Then it starts it, checks the Services, and kills it at rest.
func (k *killedNode) killAgain() {
	k.Helper()
	k.kill()
	ctx, calm := context.WithCancel(k.Context())
	stormed := make(chan struct{})
	delay := time.Duration(k.random.IntN(400)) * time.Millisecond
	go func() {
		defer close(stormed)
		for ctx.Err() == nil {
			k.change(k.random.IntN(killedServices))
		}
	}()
	k.cmd, k.log = k.launch(k.lab.Host("node1"))
	time.Sleep(delay)
	k.kill()
	calm()
	<-stormed
	k.startAndCheck()
}

// startAndCheck wants that the first sync of a process serves each Service.
func (k *killedNode) startAndCheck() {
	k.Helper()
	k.cmd, k.log = k.launch(k.lab.Host("node1"))
	k.awaitSynced(k.log)
	for i, pods := range k.endpoints {
		for _, f := range plan.Families {
			k.check(netip.AddrPortFrom(killedIP(1+i, f), 80), pods)
		}
	}
}

func (k *killedNode) awaitSynced(log *heard) {
	k.Helper()
	eventually(k.T, "both families are synced", func() bool {
		return log.count("msg=synced family=IPv4") > 0 && log.count("msg=synced family=IPv6") > 0
	})
}

// check wants an answer of one of the Pods, or a refusal if there is none.
func (k *killedNode) check(at netip.AddrPort, pods []string) {
	k.Helper()
	ctx, cancel := context.WithTimeout(k.Context(), hangTimeout)
	defer cancel()
	answer, err := k.lab.Host("pod-x").AskAndReset(ctx, "tcp", at)
	switch outcome := netlab.OutcomeOf(err); {
	case outcome == netlab.Answered && slices.Contains(pods, answer.Server), outcome == netlab.Refused && len(pods) == 0:
	default:
		k.Errorf("%s: %s (%v, %v), want an answer of %q", at, outcome, answer, err, pods)
	}
}

// load keeps connections open and makes new ones until end is called.
func (k *killedNode) load() (end func()) {
	k.Helper()
	client, first := k.lab.Host("pod-x"), map[*netlab.Conn]string{}
	ask := func(c *netlab.Conn) string {
		ctx, cancel := context.WithTimeout(k.Context(), hangTimeout)
		defer cancel()
		a, err := c.Ask(ctx)
		if err != nil {
			k.Errorf("the open connection from %s: %v", c.Local(), err)
		}
		return a.Server
	}
	ctx, stop := context.WithCancel(k.Context())
	var asking sync.WaitGroup
	k.Cleanup(func() { stop(); asking.Wait() })
	for _, f := range plan.Families {
		at := netip.AddrPortFrom(killedIP(0, f), 80)
		for _, network := range []string{"tcp", "udp"} {
			c, err := client.Open(k.Context(), network, netip.AddrPort{}, at)
			if err != nil {
				k.Fatal(err)
			}
			k.Cleanup(func() { c.Close() })
			first[c] = ask(c)
		}
		asking.Go(func() {
			for wait.For(ctx, 5*time.Millisecond) {
				k.check(at, []string{"pod-a", "pod-c"})
			}
		})
	}
	return func() {
		stop()
		asking.Wait()
		for c, server := range first {
			if now := ask(c); now != server {
				k.Errorf("the open connection from %s was answered by %s, and is by %s", c.Local(), server, now)
			}
		}
	}
}

// compareWithFreshNode compares the amount of rules with those of node2, on which nothing
// was killed. Names and numbers may differ.
func (k *killedNode) compareWithFreshNode() {
	k.Helper()
	fresh := k.lab.Host("node2")
	chooseVariant(k.T, fresh, k.variant)
	process, log := k.launch(fresh)
	k.awaitSynced(log)
	_ = process.Process.Kill()
	_ = process.Wait()
	was, want := k.lines(k.lab.Host("node1")), k.lines(fresh)
	if len(strings.Fields(strings.Join(was, ""))) != len(strings.Fields(strings.Join(want, ""))) {
		k.Errorf("the kernel has other rules than that of a fresh node (-fresh +after the kills)\n%s", cmp.Diff(want, was))
	}
}

// frame are the lines of tables without rules, which the iptables tools make to look at them.
var frame = regexp.MustCompile(`(?m)^(\*\w+|COMMIT|:[A-Z]+ ACCEPT|table ip6? (filter|nat|mangle|raw|security) \{|\}) *\n`)

// lines are the rules of a node in one order.
func (k *killedNode) lines(of *netlab.Host) []string {
	k.Helper()
	return slices.Sorted(strings.Lines(frame.ReplaceAllString(node{k.T, of}.rules(), "")))
}

// change gives a Service other endpoints, none now and then.
func (k *killedNode) change(i int) {
	pods := []string{"pod-a", "pod-b", "pod-c", "pod-d"}
	k.random.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
	k.endpoints[i] = pods[:k.random.IntN(4)]
	k.publish(fmt.Sprintf("changing-%d", i), 1+i, k.endpoints[i]...)
}

// killedIP is the cluster IP of a Service, by number.
func killedIP(n int, f plan.Family) netip.Addr { return netlab.ServiceNetwork.Nth(20 + n).Of(f) }

// publish writes a dual-stack Service with these endpoints.
func (k *killedNode) publish(name string, number int, pods ...string) {
	k.publishEdited(name, number, pods, func(string, *discoveryv1.Endpoint) {})
}

// publishEdited is publish with a change to the endpoint of each Pod.
func (k *killedNode) publishEdited(name string, number int, pods []string, edit func(pod string, e *discoveryv1.Endpoint)) {
	tcp, udp, port := corev1.ProtocolTCP, corev1.ProtocolUDP, int32(8080)
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	svc.Spec.Ports = []corev1.ServicePort{{Name: "tcp", Port: 80, Protocol: tcp}, {Name: "udp", Port: 80, Protocol: udp}}
	objects := []*discoveryv1.EndpointSlice{}
	for _, f := range plan.Families {
		svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, killedIP(number, f).String())
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name + "-" + strings.ToLower(f.String()), Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressType(f.String()),
			Ports:       []discoveryv1.EndpointPort{{Name: new("tcp"), Port: &port, Protocol: &tcp}, {Name: new("udp"), Port: &port, Protocol: &udp}},
		}
		for _, pod := range pods {
			e := discoveryv1.Endpoint{Addresses: []string{k.lab.Host(pod).Addr.Of(f).String()}}
			edit(pod, &e)
			slice.Endpoints = append(slice.Endpoints, e)
		}
		objects = append(objects, slice)
	}
	svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	if err := k.dir.Publish(name+".yaml", svc, objects[0], objects[1]); err != nil {
		k.Error(err)
	}
}
