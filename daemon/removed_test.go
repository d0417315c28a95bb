// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"

	"signalbox/internal/netlab"
	"signalbox/internal/wait"
	"signalbox/proxier/plan"
)

// maxReset fails the test. A reset takes less than a second on an idle machine, and the log
// has the measured time: a busy machine must not fail the test.
const maxReset = 10 * time.Second

// TestResetRemovedEndpoints: with --reset-removed-endpoints, a client's connection is reset once
// its endpoint has left the EndpointSlices. The endpoint itself would go on answering. A
// connection to an endpoint that only terminates goes on.
func TestResetRemovedEndpoints(t *testing.T) {
	for _, variant := range []string{"nftables", "iptables", "iptables-legacy", "ipvs", "userspace"} {
		t.Run(variant, func(t *testing.T) {
			k := newKilledNode(t, variant)
			chooseVariant(t, k.lab.Host("node1"), variant)
			k.publish("web", 0, "pod-a", "pod-c")
			k.cmd, k.log = k.launch(k.lab.Host("node1"), "--reset-removed-endpoints")
			k.awaitSynced(k.log)
			removed, terminating := map[plan.Family]*netlab.Conn{}, map[plan.Family]*netlab.Conn{}
			for _, f := range plan.Families {
				removed[f], terminating[f] = k.openTo(f, "pod-a"), k.openTo(f, "pod-c")
			}

			began := time.Now()
			k.publishEdited("web", 0, []string{"pod-b", "pod-c"}, func(pod string, e *discoveryv1.Endpoint) {
				if pod == "pod-c" {
					e.Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
				}
			})
			var asking sync.WaitGroup
			for f, c := range removed {
				asking.Go(func() {
					err := k.askUntilError(c)
					took := time.Since(began)
					if !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%s: %v after its endpoint was removed, the connection was not reset: %v", f, took, err)
					}
					t.Logf("%s: reset %v after the change of the EndpointSlice", f, took.Round(time.Millisecond))
				})
			}
			asking.Wait()
			for f, c := range terminating {
				if a, err := c.Ask(k.Context()); err != nil || a.Server != "pod-c" {
					t.Errorf("%s: the connection to the terminating endpoint: %v, %v", f, a, err)
				}
			}
		})
	}
}

// openTo opens connections to the Service web until one leads to the Pod.
func (k *killedNode) openTo(f plan.Family, pod string) (c *netlab.Conn) {
	k.Helper()
	eventually(k.T, "a connection to "+pod, func() bool {
		var err error
		if c, err = k.lab.Host("pod-x").Open(k.Context(), "tcp", netip.AddrPort{}, netip.AddrPortFrom(killedIP(0, f), 80)); err != nil {
			k.Fatal(err)
		}
		k.Cleanup(func() { c.Close() })
		a, err := c.Ask(k.Context())
		if err != nil {
			k.Fatal(err)
		}
		return a.Server == pod
	})
	return c
}

// askUntilError asks on a connection until it fails, at most for maxReset.
func (k *killedNode) askUntilError(c *netlab.Conn) (err error) {
	ctx, cancel := context.WithTimeout(k.Context(), maxReset)
	defer cancel()
	for err == nil && wait.For(ctx, 5*time.Millisecond) {
		_, err = c.Ask(ctx)
	}
	return err
}
