// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"signalbox/internal/netlab"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

// send applies Services of ten endpoints each, as a source does that has them in its
// cache.
func send(l *syncer.Loop, services int) {
	port, protocol := int32(8080), corev1.ProtocolTCP
	for i := range services {
		name := fmt.Sprintf("svc-%d", i)
		ip := netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}).String()
		l.Apply(&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip},
				Ports: []corev1.ServicePort{{Port: 80, Protocol: protocol}},
			},
		})
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: new(string), Port: &port, Protocol: &protocol}},
		}
		for n := range 10 {
			pod := i*10 + n
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{netip.AddrFrom4([4]byte{10, byte(128 + pod>>16), byte(pod >> 8), byte(pod)}).String()},
				NodeName:  new(fmt.Sprintf("node%d", 1+pod%100)),
			})
		}
		l.Apply(slice)
	}
}

// BenchmarkStart measures from the moment when the caches are filled until every
// Service is in the kernel: of a node that has no rules yet, and of a restart,
// which finds those of the process before.
func BenchmarkStart(b *testing.B) {
	for _, mode := range []string{"nftables", "iptables"} {
		for _, services := range []int{1, 10_000} {
			for _, restart := range []bool{false, true} {
				name := map[bool]string{false: "cold", true: "restart"}[restart]
				b.Run(fmt.Sprintf("%s/services=%d/%s", mode, services, name), func(b *testing.B) {
					var cpu time.Duration
					for b.Loop() {
						b.StopTimer()
						cpu += startOnce(b, mode, services, restart)
						b.StartTimer()
					}
					b.ReportMetric(float64(cpu.Milliseconds())/float64(b.N), "cpu-ms/op")
				})
			}
		}
	}
}

// cpuTime is what this process, and programs that it ran, have used.
func cpuTime() (used time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		if unix.Getrusage(who, &r) == nil {
			used += time.Duration(r.Utime.Nano() + r.Stime.Nano())
		}
	}
	return used
}

// startOnce runs the timer during one start on a host of its own, and returns
// the processor time that it took: on a machine that others use, the better
// measure.
func startOnce(b *testing.B, name string, services int, restart bool) (cpu time.Duration) {
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer lab.Close()
	mode, err := modes.Named(name)
	if err != nil {
		b.Fatal(err)
	}
	start := func(timed bool) error {
		p, err := mode.New(proxier.Options{Family: plan.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark})
		if err != nil {
			return err
		}
		defer p.Close()
		l := syncer.NewLoop(syncer.LoopOptions{
			NodeName: "node1", Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: p}, Logger: slog.New(slog.DiscardHandler),
		})
		send(l, services)
		if timed {
			before := cpuTime()
			b.StartTimer()
			defer func() {
				b.StopTimer()
				cpu = cpuTime() - before
			}()
		}
		l.Synced()
		return l.SyncNow(context.Background())
	}
	err = lab.Host("node1").Do(func() error {
		if restart {
			if err := start(false); err != nil {
				return err
			}
		}
		return start(true)
	})
	if err != nil {
		b.Fatal(err)
	}
	return cpu
}
