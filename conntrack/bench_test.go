// SPDX-License-Identifier: Apache-2.0

package conntrack

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// BenchmarkScan lists a table in which one flow in ten is UDP, none of them
// stale: what every change of a UDP Service costs besides what it removes.
func BenchmarkScan(b *testing.B) {
	for _, flows := range []int{1000, 50000} {
		b.Run(fmt.Sprintf("flows=%d", flows), func(b *testing.B) {
			nstest.Enter(b)
			h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
			if err != nil {
				b.Fatal(err)
			}
			defer h.Close()
			for i := range flows {
				addFlow(b, h, i)
			}
			t, err := openTable()
			if err != nil {
				b.Fatal(err)
			}
			defer t.close()
			d := tasks{key("10.96.0.10:53"): {usable: endpoints("10.0.0.1:53")}}
			seen := 0
			b.ResetTimer()
			for b.Loop() {
				seen = 0
				if err := t.each(plan.IPv4, plan.UDP, func(f *flow) {
					seen++
					if d.stale(f, func(netip.Addr) bool { return true }, func(netip.Addr) bool { return false }) {
						b.Fatal("a flow is stale")
					}
				}); err != nil {
					b.Fatal(err)
				}
			}
			if seen != flows/10 {
				b.Errorf("%d UDP flows seen, want %d", seen, flows/10)
			}
		})
	}
}

func addFlow(b *testing.B, h *netlink.Handle, i int) {
	b.Helper()
	f := &netlink.ConntrackFlow{
		FamilyType: unix.AF_INET, TimeOut: 3600,
		Forward: netlink.IPTuple{
			SrcIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}).AsSlice(), DstIP: netip.MustParseAddr("10.96.0.10").AsSlice(),
			SrcPort: uint16(1024 + i>>16), DstPort: 53, Protocol: unix.IPPROTO_TCP,
		},
	}
	if i%10 == 0 {
		f.Forward.Protocol = unix.IPPROTO_UDP
	} else {
		f.ProtoInfo = &netlink.ProtoInfoTCP{State: 3}
	}
	f.Reverse = netlink.IPTuple{
		SrcIP: netip.MustParseAddr("10.0.0.1").AsSlice(), DstIP: f.Forward.SrcIP, SrcPort: 53, DstPort: f.Forward.SrcPort, Protocol: f.Forward.Protocol,
	}
	if err := h.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, f); err != nil {
		b.Fatalf("making flow %d: %v", i, err)
	}
}
