// SPDX-License-Identifier: Apache-2.0

package compare

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"signalbox/internal/cluster"
	"signalbox/internal/netlab"
	"signalbox/internal/testbed"
)

// side is a lab with one of the two proxies.
type side struct {
	proxy   testbed.Proxy
	bed     *testbed.Bed
	asker   *asker
	process *cluster.Process
}

// convergeTimeout is how long a proxy may take to serve what was written.
const convergeTimeout = 10 * time.Minute

// newSide builds a lab. Its proxy does not run yet.
func newSide(c *cluster.Cluster, proxy testbed.Proxy, dir string) (*side, error) {
	dir = filepath.Join(dir, proxy.Program)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	bed, err := testbed.New(c, labOptions, dir)
	if err != nil {
		return nil, err
	}
	s := &side{proxy: proxy, bed: bed, asker: newAsker(bed.Lab)}
	if err := s.prepare(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *side) prepare() error {
	if err := checkLayout(s.bed.Lab); err != nil {
		return err
	}
	for _, p := range []netlab.PrefixPair{externalNetwork, balancerNetwork} {
		for _, one := range []netip.Prefix{p.V4, p.V6} {
			if err := s.bed.Lab.RouteVIP(one, "node1"); err != nil {
				return err
			}
		}
	}
	return addSources(s.bed.Lab)
}

func (s *side) start() (err error) {
	s.process, err = s.bed.Start(s.proxy)
	return err
}

// forgetSoon shortens how long the node keeps connections that have ended: many probes
// would fill its table. It works when the proxy tracks connections.
func (s *side) forgetSoon() error {
	return s.bed.Lab.Host("node1").Do(func() error {
		for _, name := range []string{"tcp_timeout_time_wait", "tcp_timeout_close", "udp_timeout", "udp_timeout_stream"} {
			if err := os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_"+name, []byte("2"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

// awaitMarker waits until the proxy serves a marker in both families.
func (s *side) awaitMarker(ctx context.Context, vip netlab.Pair) error {
	ctx, cancel := context.WithTimeout(ctx, convergeTimeout)
	defer cancel()
	for _, a := range []netip.Addr{vip.V4, vip.V6} {
		if err := s.awaitAnswer(ctx, netip.AddrPortFrom(a, markerPort)); err != nil {
			return fmt.Errorf("%s does not serve the marker %s: %w; its log ends with\n%s", s.proxy.Name(), a, err, s.process.Tail(12))
		}
	}
	return nil
}

func (s *side) awaitAnswer(ctx context.Context, at netip.AddrPort) error {
	for {
		one, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err := s.bed.Lab.Host("pod-x").Ask(one, "udp", netip.AddrPort{}, at)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-s.process.Done():
			return s.process.Ended()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *side) close() error {
	if s.process != nil {
		// kube-proxy ends by the signal itself, which is no fault here.
		_ = testbed.Stop(s.process)
	}
	s.asker.close()
	return s.bed.Close()
}
