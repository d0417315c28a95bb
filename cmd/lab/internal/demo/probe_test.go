// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"signalbox/internal/netlab"
)

var (
	podAddr    = netip.MustParseAddr("10.244.1.12")
	nodeAddr   = netip.MustParseAddr("172.18.0.11")
	clientAddr = netip.MustParseAddr("198.51.100.10")
)

// found is what came of connections over one protocol: answers in the order
// pod-a, pod-b, pod-c, pod-d.
func found(source netip.Addr, answers ...int) *tally {
	n := newTally()
	for i, count := range answers {
		for range count {
			n.count(netlab.Answer{Server: allPods[i], Seen: netip.AddrPortFrom(source, 4321)}, nil)
		}
	}
	return n
}

func failing(n *tally, count int, err error) *tally {
	for range count {
		n.count(netlab.Answer{}, err)
	}
	return n
}

// rowOf is a row of the table of places, where both protocols found n.
func rowOf(t *testing.T, through, from string, n *tally, owned ...netip.Addr) row {
	t.Helper()
	for _, p := range places {
		if p.through == through && p.from == from {
			return row{place: p, at: netip.MustParseAddrPort("10.96.0.10:80"), owned: owned,
				tallies: map[string]*tally{"tcp": n, "udp": n}}
		}
	}
	t.Fatalf("no place is reached through %q from %s", through, from)
	return row{}
}

func TestWhatIsWrong(t *testing.T) {
	for _, c := range []struct {
		name          string
		through, from string
		found         *tally
		owned         netip.Addr
		want          string // part of what is said; empty for right
	}{
		{"spread over all", "ClusterIP", clientPod, found(podAddr, 3, 1, 2, 4), podAddr, ""},
		{"one Pod never answers", "ClusterIP", clientPod, found(podAddr, 3, 0, 2, 4), podAddr, "expected answers from each of pod-a, pod-b, pod-c, pod-d, but pod-a answered 3, pod-c answered 2, pod-d answered 4"},
		{"not masqueraded", "ClusterIP", outsideClient, found(clientAddr, 1, 1, 1, 1), nodeAddr, "expected the Pods to see an address of node1, but they saw 198.51.100.10"},
		{"masqueraded for no reason", "ClusterIP", clientPod, found(nodeAddr, 1, 1, 1, 1), podAddr, "expected the Pods to see the client's own address, but they saw 172.18.0.11"},
		{"some are refused", "ClusterIP", clientPod, failing(found(podAddr, 3, 1, 2, 4), 2, syscall.ECONNREFUSED), podAddr, "2 were refused (connection refused)"},
		{"local Pods only", "NodePort, Local", outsideClient, found(clientAddr, 3, 4), clientAddr, ""},
		{"policy Local is not kept", "NodePort, Local", outsideClient, found(clientAddr, 3, 4, 1), clientAddr, "expected answers from pod-a, pod-b only"},
		{"affinity", "ClusterIP, affinity", clientPod, found(podAddr, 0, 0, 9), podAddr, ""},
		{"no affinity", "ClusterIP, affinity", clientPod, found(podAddr, 0, 1, 9), podAddr, "expected one Pod to answer all of the client's connections"},
		{"affinity to nobody", "ClusterIP, affinity", clientPod, found(podAddr), podAddr, "there was no connection"},
		{"refused", "ClusterIP, no Pod", clientPod, failing(newTally(), 3, syscall.ECONNREFUSED), podAddr, ""},
		{"silent instead of refused", "ClusterIP, no Pod", clientPod, failing(newTally(), 1, syscall.ETIMEDOUT), podAddr, "expected every connection to be refused, but 1 was silent"},
		{"partly refused", "ClusterIP, no Pod", clientPod, failing(failing(newTally(), 1, syscall.ECONNREFUSED), 1, syscall.EHOSTUNREACH), podAddr, "1 was refused, 1 was unreachable"},
		{"answered instead of refused", "ClusterIP, no Pod", clientPod, found(podAddr, 1), podAddr, "pod-a answered 1"},
		{"hairpin", "ClusterIP, to itself", "pod-b", found(nodeAddr, 0, 5), nodeAddr, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := rowOf(t, c.through, c.from, c.found, c.owned)
			wrong := r.wrong()
			if c.want == "" {
				if len(wrong) > 0 {
					t.Errorf("called wrong: %q", wrong)
				}
				return
			}
			// Both protocols found the same, so both are named.
			if len(wrong)%2 != 0 || !strings.Contains(strings.Join(wrong, "\n"), c.want) {
				t.Errorf("got %q, want %q over both protocols", wrong, c.want)
			}
			for _, w := range wrong {
				if !strings.Contains(w, c.through+" from "+c.from+" to 10.96.0.10:80/") {
					t.Errorf("%q does not say where", w)
				}
			}
		})
	}
}
