// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"encoding/json"
	"net/netip"
	"testing"

	"signalbox/internal/nstest"
	"signalbox/ipvs/internal/kernel"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// TestCounts compares Counts with the kernel, after a full write and after changes.
func TestCounts(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		plan := w.example()
		p, _ := start(t, w.family, nil)
		if n := len(p.Counts()); n != 0 {
			t.Errorf("%d counts before the first sync", n)
		}
		syncAll(t, p, plan)
		compareCounts(t, p)
		for n := range 3 {
			syncOne(t, p, plan, conformance.FleetService(w.family, 100+n, 10*n, 10-n))
			compareCounts(t, p)
		}
		gone := *conformance.FleetService(w.family, 101, 0, 1)
		gone.Frontends = nil
		syncOne(t, p, plan, &gone)
		compareCounts(t, p)
	})
}

// compareCounts holds the lock, so that nothing drains while it reads.
func compareCounts(t *testing.T, p *Proxier) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock() // also after a failure, or Close would wait for ever
	want := map[string]int{"virtual-server": 0, "real-server": 0, "address": len(heldAddrs(t, p.Family)), "element": elements(t, p)}
	countServers(t, p, want)
	counted := p.current().counts()
	got := map[string]int{}
	for _, k := range counted {
		got[k.Kind] = k.Count
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Counts (- in the kernel, + counted)\n%s", diff)
	}
}

// countServers lists the destinations of each server of the namespace. The listing in /proc
// lacks some while other namespaces have virtual servers.
func countServers(t *testing.T, p *Proxier, into map[string]int) {
	t.Helper()
	servers, err := p.ipvs.Servers()
	if err != nil {
		t.Fatal(err)
	}
	for key := range servers {
		dests, err := p.ipvs.Destinations(key)
		if err != nil {
			t.Fatal(err)
		}
		into["virtual-server"]++
		into["real-server"] += len(dests)
	}
}

func heldAddrs(t *testing.T, family plan.Family) (held []netip.Addr) {
	t.Helper()
	link, err := netlink.LinkByName(kernel.DeviceName)
	if err != nil {
		t.Fatal(err)
	}
	number := map[plan.Family]int{plan.IPv4: netlink.FAMILY_V4, plan.IPv6: netlink.FAMILY_V6}[family]
	addrs, err := netlink.AddrList(link, number)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, _ := netip.AddrFromSlice(a.IP); !ip.IsLinkLocalUnicast() {
			held = append(held, ip.Unmap())
		}
	}
	return held
}

// elements counts the elements of all sets but the map of clients.
func elements(t *testing.T, p *Proxier) (n int) {
	t.Helper()
	word := map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[p.Family]
	out := nstest.NFT(t, "", "-j", "list", "table", word, tableName)
	type set struct {
		Name string
		Elem []json.RawMessage
	}
	var listing struct{ Nftables []struct{ Set, Map *set } }
	if err := json.Unmarshal([]byte(out), &listing); err != nil {
		t.Fatal(err)
	}
	for _, object := range listing.Nftables {
		for _, s := range []*set{object.Set, object.Map} {
			if s != nil && s.Name != "affinity" {
				n += len(s.Elem)
			}
		}
	}
	return n
}
