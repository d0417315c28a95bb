// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"net/netip"
	"os"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/measure"
	"signalbox/internal/testbed"
)

const haproxyProgram = "haproxy"

// HAProxy is haproxy in tcp mode, to compare the userspace mode with. It knows no Services,
// so only TCP connections are measured.
func HAProxy(binary string) testbed.Proxy {
	return testbed.Proxy{Program: haproxyProgram, Mode: "tcp", Command: []string{binary, "-db", "-f"}}
}

// startHAProxy makes haproxy listen on the virtual addresses, which the node then has.
func (t *trial) startHAProxy(ctx context.Context) error {
	relays := map[netip.AddrPort]netip.AddrPort{}
	for _, f := range t.families {
		if err := t.bed.Lab.Host("node1").AddAddrTo("lo", t.clusterIP(f, t.fixed())); err != nil {
			return err
		}
		for _, p := range connectionPorts {
			if p.protocol == corev1.ProtocolTCP {
				relays[t.virtual(f, p)] = netip.AddrPortFrom(t.bed.Lab.Host(fixedPod).Addr.Of(f), p.pod)
			}
		}
	}
	config := t.bed.LogPath(t.proxy) + ".cfg"
	if err := os.WriteFile(config, measure.HAProxyConfig(relays), 0o600); err != nil {
		return err
	}
	t.proxy.Command = append(slices.Clone(t.proxy.Command), config)
	if _, err := t.start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return t.bed.Lab.Host(clientPod).Do(func() error {
		for at := range relays {
			if err := t.answers(ctx, at); err != nil {
				return err
			}
		}
		return nil
	})
}
