// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"signalbox/internal/measure"
	"signalbox/proxier/plan"
)

// fixedPod is the endpoint of the Service whose endpoint never changes.
const fixedPod = "pod-a"

// connectionPort is a port of that Service.
type connectionPort struct {
	name         string
	protocol     corev1.Protocol
	service, pod uint16
	// direct is where connections that use no Service go. If they went to the Service's
	// port of the Pod, both would sometimes have the same source port. The node would
	// then search for another one.
	direct uint16
}

var (
	connectPort  = connectionPort{"connect", corev1.ProtocolTCP, 80, 8080, 8081}
	datagramPort = connectionPort{"datagram", corev1.ProtocolUDP, 80, 8080, 8081}
	bulkPort     = connectionPort{"bulk", corev1.ProtocolTCP, 81, 9091, 9092}
	newPort      = connectionPort{"new", corev1.ProtocolTCP, 82, 9093, 9094}

	connectionPorts = []connectionPort{connectPort, datagramPort, bulkPort, newPort}
)

const (
	// rateTurns is how often a rate is measured on each way.
	rateTurns = 3
	// rateClients make new connections at the same time.
	rateClients = 8
	exchanges   = 2000
)

// listen makes the Pods answer that a lab's own servers do not cover. It ends with ctx.
func (t *trial) listen(ctx context.Context) error {
	for _, f := range t.families {
		if err := t.bed.Lab.GiveRange(endpointRanges[f], othersPod); err != nil {
			return err
		}
	}
	for _, s := range []struct {
		pod    string
		port   uint16
		handle func(net.Conn)
	}{
		{othersPod, othersPort, measure.End},
		{fixedPod, bulkPort.pod, measure.Discard}, {fixedPod, bulkPort.direct, measure.Discard},
		{fixedPod, newPort.pod, measure.End}, {fixedPod, newPort.direct, measure.End},
	} {
		l, err := t.bed.Lab.Host(s.pod).Listen("tcp", fmt.Sprintf(":%d", s.port))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return // closed
				}
				go s.handle(c)
			}
		}()
	}
	return nil
}

func (t *trial) virtual(f plan.Family, p connectionPort) netip.AddrPort {
	return netip.AddrPortFrom(t.clusterIP(f, t.fixed()), p.service)
}

func (t *trial) direct(f plan.Family, p connectionPort) netip.AddrPort {
	return netip.AddrPortFrom(t.bed.Lab.Host(fixedPod).Addr.Of(f), p.direct)
}

// ofFamily is the name of a figure that each family has.
func ofFamily(figure, family string) string { return figure + "_" + strings.ToLower(family) }

func (t *trial) set(f plan.Family, figure string, v float64) {
	t.figures[ofFamily(figure, f.String())] = v
}

func (t *trial) setLatencies(f plan.Family, name string, l measure.Latencies) {
	through, direct := measure.Median(l.Through), measure.Median(l.Direct)
	t.set(f, name+"_p50", through.Seconds())
	t.set(f, name+"_p99", measure.Quantile(l.Through, 0.99).Seconds())
	t.set(f, name+"_direct", direct.Seconds())
	t.set(f, name+"_added", (through - direct).Seconds())
}

// takeTurns times something from a host on both ways.
func (t *trial) takeTurns(ctx context.Context, host string, once func(netip.AddrPort) (time.Duration, error), through, direct netip.AddrPort) (l measure.Latencies, err error) {
	err = t.bed.Lab.Host(host).Do(func() error {
		l, err = measure.TakeTurns(ctx, once, through, direct)
		return err
	})
	return l, err
}

// plainConnect times connections to a Pod while the node has no rules.
func (t *trial) plainConnect(ctx context.Context) error {
	for _, f := range t.families {
		l, err := t.takeTurns(ctx, clientPod, measure.Connect, t.direct(f, connectPort), t.direct(f, connectPort))
		if err != nil {
			return err
		}
		t.set(f, "connect_plain", measure.Median(l.Through).Seconds())
	}
	return nil
}

// connections measures TCP through the virtual IP beside TCP straight to the Pod.
func (t *trial) connections(ctx context.Context) error {
	for _, f := range t.families {
		for _, part := range []func(context.Context, plan.Family) error{t.connect, t.exchange, t.bulk, t.newConnections} {
			if err := part(ctx, f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *trial) connect(ctx context.Context, f plan.Family) error {
	for _, from := range []struct{ host, figure string }{{clientPod, "connect"}, {"node1", "node_connect"}} {
		l, err := t.takeTurns(ctx, from.host, measure.Connect, t.virtual(f, connectPort), t.direct(f, connectPort))
		if err != nil {
			return err
		}
		t.setLatencies(f, from.figure, l)
	}
	return nil
}

// exchange times a question and its answer on one open connection.
func (t *trial) exchange(ctx context.Context, f plan.Family) error {
	c, err := t.bed.Lab.Host(clientPod).Open(ctx, "tcp", netip.AddrPort{}, t.virtual(f, connectPort))
	if err != nil {
		return err
	}
	defer c.Close()
	var took []time.Duration
	for range exchanges {
		began := time.Now()
		if _, err := c.Ask(ctx); err != nil {
			return err
		}
		took = append(took, time.Since(began))
	}
	t.set(f, "exchange_p50", measure.Median(took).Seconds())
	return nil
}

func (t *trial) bulk(ctx context.Context, f plan.Family) error {
	return t.rate(ctx, f, bulkPort, func(to netip.AddrPort) (float64, error) {
		return measure.Bulk(t.bed.Lab.Host(clientPod).Do, to, 1, t.times.rate)
	})
}

func (t *trial) newConnections(ctx context.Context, f plan.Family) error {
	return t.rate(ctx, f, newPort, func(to netip.AddrPort) (float64, error) {
		return measure.NewConnections(t.bed.Lab.Host(clientPod).Do, to, rateClients, t.times.rate)
	})
}

// rate measures a rate on both ways in turns.
func (t *trial) rate(ctx context.Context, f plan.Family, p connectionPort, of func(netip.AddrPort) (float64, error)) error {
	var through, direct []float64
	for range rateTurns {
		for _, way := range []struct {
			to    netip.AddrPort
			rates *[]float64
		}{{t.virtual(f, p), &through}, {t.direct(f, p), &direct}} {
			if err := ctx.Err(); err != nil {
				return err
			}
			v, err := of(way.to)
			if err != nil {
				return fmt.Errorf("%s connections to %s: %w", p.name, way.to, err)
			}
			*way.rates = append(*way.rates, v)
		}
	}
	t.set(f, p.name+"_rate", measure.Median(through))
	t.set(f, p.name+"_share", measure.Median(through)/measure.Median(direct))
	return nil
}

// datagrams times the first datagram of a UDP flow and its answer.
func (t *trial) datagrams(ctx context.Context) error {
	for _, f := range t.families {
		l, err := t.takeTurns(ctx, clientPod, measure.Datagram, t.virtual(f, datagramPort), t.direct(f, datagramPort))
		if err != nil {
			return err
		}
		t.setLatencies(f, "datagram", l)
	}
	return nil
}
