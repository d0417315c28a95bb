// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"signalbox/internal/nstest"
	"signalbox/ipvs/internal/kernel"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// hasIPSet skips a test if the kernel has no ipset. It fails on the virtual machine, which has.
func hasIPSet(t *testing.T) {
	t.Helper()
	if _, _, err := netlink.IpsetProtocol(); err != nil {
		if os.Getenv("SIGNALBOX_VM_RELEASE") != "" {
			t.Fatal(err)
		}
		t.Skipf("this kernel has no ip_set: %v", err)
	}
}

func makeSet(t *testing.T, name, kind string, f plan.Family, entries ...netlink.IPSetEntry) {
	t.Helper()
	opts := netlink.IpsetCreateOptions{Family: unix.AF_INET, PortTo: 65535}
	if f == plan.IPv6 {
		opts.Family = unix.AF_INET6
	}
	if err := netlink.IpsetCreate(name, kind, opts); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for _, e := range entries {
		if err := netlink.IpsetAdd(name, &e); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// makePortSet makes a set of ports. The library would add a protocol, which the kernel refuses.
func makePortSet(t *testing.T, name string, f plan.Family, port uint16) {
	t.Helper()
	makeSet(t, name, "bitmap:port", f)
	req := nl.NewNetlinkRequest(nl.IPSET_CMD_ADD|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(nl.IPSET_CMD_ADD))
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_NETLINK, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)))
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|int(nl.NLA_F_NESTED), nil)
	data.AddRtAttr(int(nl.IPSET_ATTR_PORT|nl.NLA_F_NET_BYTEORDER), binary.BigEndian.AppendUint16(nil, port))
	req.AddData(data)
	if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func ptr[T any](v T) *T { return &v }

func frontendEntry(at netip.AddrPort) netlink.IPSetEntry {
	return netlink.IPSetEntry{IP: at.Addr().AsSlice(), Port: ptr(at.Port()), Protocol: ptr(uint8(unix.IPPROTO_TCP))}
}

func TestSetNames(t *testing.T) {
	for _, c := range []struct{ name, v4, v6 string }{
		{"KUBE-CLUSTER-IP", "KUBE-CLUSTER-IP", "KUBE-6-CLUSTER-IP"},
		{"KUBE-NODE-PORT-LOCAL-SCTP-HASH", "KUBE-NODE-PORT-LOCAL-SCTP-HASH", "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS"},
	} {
		if v4, v6 := kernel.KubeProxySetName(c.name, plan.IPv4), kernel.KubeProxySetName(c.name, plan.IPv6); v4 != c.v4 || v6 != c.v6 {
			t.Errorf("%s: %q and %q, want %q and %q", c.name, v4, v6, c.v4, c.v6)
		}
	}
}

// kube-proxy's ipsets of the family are removed, and others stay.
func TestKubeProxySets(t *testing.T) {
	nstest.Enter(t)
	hasIPSet(t)
	save := func() []netlink.IPSetResult {
		all, err := netlink.IpsetListAll()
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(all, func(a, b netlink.IPSetResult) int { return strings.Compare(a.SetName, b.SetName) })
		return all
	}
	for _, f := range plan.Families {
		w := world{f}
		makeSet(t, "cali40s-"+f.String(), "hash:ip", f, netlink.IPSetEntry{IP: w.addr("10.1.1.1", "fd00::1").AsSlice()})
		makeSet(t, "KUBE-SRC-"+f.String(), "hash:ip,port", f, frontendEntry(netip.AddrPortFrom(w.addr("10.1.1.1", "fd00::1"), 80)))
	}
	before := save()
	vip := map[plan.Family]netip.AddrPort{
		plan.IPv4: netip.MustParseAddrPort("10.96.0.1:443"), plan.IPv6: netip.MustParseAddrPort("[fd00:96::1]:443"),
	}
	for _, f := range plan.Families {
		makeSet(t, kernel.KubeProxySetName("KUBE-CLUSTER-IP", f), "hash:ip,port", f, frontendEntry(vip[f]))
		makePortSet(t, kernel.KubeProxySetName("KUBE-NODE-PORT-UDP", f), f, 30053)
	}
	for _, f := range plan.Families {
		sets, err := kernel.ReadKubeProxySets(f)
		if err != nil || len(sets) != 2 {
			t.Fatalf("%s: %+v, %v", f, sets, err)
		}
		named := func(key kernel.ServerKey) bool {
			return slices.ContainsFunc(sets, func(s kernel.KubeProxySet) bool { return s.Names(key, func(netip.Addr) bool { return true }) })
		}
		for key, want := range map[kernel.ServerKey]bool{
			{Addr: vip[f].Addr(), Port: 443, Protocol: plan.TCP}:   true,
			{Addr: vip[f].Addr(), Port: 443, Protocol: plan.UDP}:   false,
			{Addr: vip[f].Addr(), Port: 80, Protocol: plan.TCP}:    false,
			{Addr: vip[f].Addr(), Port: 30053, Protocol: plan.UDP}: true,
			{Addr: vip[f].Addr(), Port: 30053, Protocol: plan.TCP}: false,
		} {
			if named(key) != want {
				t.Errorf("%s: %s is kube-proxy's: %v, want %v", f, key, !want, want)
			}
		}
		if _, _, err := cleanupKubeProxy(f, false, false); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(before, save()); diff != "" {
		t.Errorf("(-before +after)\n%s", diff)
	}
}

// serversText lists all virtual servers of the family.
func serversText(t *testing.T, k ipvsClient) map[string][]kernel.Destination {
	t.Helper()
	all, err := k.Servers()
	if err != nil {
		t.Fatal(err)
	}
	text := make(map[string][]kernel.Destination)
	for key := range all {
		if text[key.String()], err = k.Destinations(key); err != nil {
			t.Fatal(err)
		}
	}
	return text
}

// Only kube-proxy's virtual servers are removed: those at addresses of the device, and those at
// the node's addresses that a set of NodePorts names.
func TestCleanupKubeProxy(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		hasIPSet(t)
		node, vip, alien := w.addr("192.0.2.200", "2001:db8::200"), w.addr("10.96.0.1", "fd00:96::1"), w.addr("203.0.113.9", "2001:db8::9")
		k, err := kernel.OpenIPVS(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		dest := netip.AddrPortFrom(w.addr("10.244.0.5", "fd00:244::5"), 8080)
		serve := func(key kernel.ServerKey) {
			t.Helper()
			for _, o := range []kernel.Op{{Verb: kernel.AddServer, Key: key, Scheduler: "rr"}, {Verb: kernel.AddDestination, Key: key, Destination: dest, Weight: 1}} {
				if err := do(k, o); err != nil {
					t.Fatal(err)
				}
			}
		}
		serve(kernel.ServerKey{Mark: 7})
		serve(kernel.ServerKey{Addr: node, Port: 80, Protocol: plan.TCP})
		serve(kernel.ServerKey{Addr: node, Port: 30080, Protocol: plan.UDP})
		serve(kernel.ServerKey{Addr: alien, Port: 30080, Protocol: plan.TCP}) // of a keepalived on another node
		foreign := serversText(t, k)

		serve(kernel.ServerKey{Addr: vip, Port: 443, Protocol: plan.TCP})
		serve(kernel.ServerKey{Addr: node, Port: 30080, Protocol: plan.TCP})
		makeSet(t, kernel.KubeProxySetName("KUBE-CLUSTER-IP", w.family), "hash:ip,port", w.family, frontendEntry(netip.AddrPortFrom(vip, 443)))
		makePortSet(t, kernel.KubeProxySetName("KUBE-NODE-PORT-TCP", w.family), w.family, 30080)
		d, err := kernel.OpenDevice(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Ensure(); err != nil {
			t.Fatal(err)
		}
		if err := d.Add([]netip.Addr{vip}, func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
		whole := serversText(t, k)

		// signalbox has nothing here.
		if removed, _, err := (Dataplane{}).Cleanup(w.family, false); err != nil || removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if diff := cmp.Diff(whole, serversText(t, k), cmp.AllowUnexported(kernel.Destination{}), compareAddrPorts); diff != "" {
			t.Errorf("Cleanup changed what is kube-proxy's (-before +after)\n%s", diff)
		}
		// If the mode serves the family, the servers at addresses of the device stay.
		if _, _, err := cleanupKubeProxy(w.family, true, false); err != nil {
			t.Fatal(err)
		}
		shared := maps.Clone(foreign)
		shared[kernel.ServerKey{Addr: vip, Port: 443, Protocol: plan.TCP}.String()] = foreign[kernel.ServerKey{Mark: 7}.String()]
		if diff := cmp.Diff(shared, serversText(t, k), cmp.AllowUnexported(kernel.Destination{}), compareAddrPorts); diff != "" {
			t.Errorf("with the device shared (-want +got)\n%s", diff)
		}
		if removed, _, err := cleanupKubeProxy(w.family, false, true); err != nil || !removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if diff := cmp.Diff(foreign, serversText(t, k), cmp.AllowUnexported(kernel.Destination{}), compareAddrPorts); diff != "" {
			t.Errorf("(-before +after)\n%s", diff)
		}
		if err := d.Find(); err != nil || d.Exists() {
			t.Errorf("device %s is left: %v", kernel.DeviceName, err)
		}
	})
}

var compareAddrPorts = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

// listedIPVS is an IPVS with fixed virtual servers. It records messages.
type listedIPVS struct {
	ipvsClient
	all map[kernel.ServerKey][]kernel.Destination
	ops []kernel.Op
}

func (k *listedIPVS) Servers() (map[kernel.ServerKey]string, error) {
	list := make(map[kernel.ServerKey]string)
	for key := range k.all {
		list[key] = "rr"
	}
	return list, nil
}

func (k *listedIPVS) Destinations(key kernel.ServerKey) ([]kernel.Destination, error) {
	return k.all[key], nil
}

func (k *listedIPVS) Send(ops []kernel.Op, _ func(kernel.Op)) error {
	k.ops = append(k.ops, ops...)
	return nil
}

// A virtual server with connections stays and gets no new ones. A server without connections is
// removed.
func TestServersWithConnectionsStay(t *testing.T) {
	vip, node := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("192.0.2.200")
	busy := kernel.ServerKey{Addr: vip, Port: 443, Protocol: plan.TCP}
	idle := kernel.ServerKey{Addr: vip, Port: 80, Protocol: plan.TCP}
	foreign := kernel.ServerKey{Addr: node, Port: 80, Protocol: plan.TCP}
	a, b := netip.MustParseAddrPort("10.244.0.5:8080"), netip.MustParseAddrPort("10.244.0.6:8080")
	k := &listedIPVS{all: map[kernel.ServerKey][]kernel.Destination{
		busy:    {{Addr: a, Weight: 1, Connections: 2}, {Addr: b, Weight: 0}},
		idle:    {{Addr: a, Weight: 1}},
		foreign: {{Addr: a, Weight: 1, Connections: 1}},
	}}
	c := cleanup{onDevice: map[netip.Addr]bool{vip: true}, drain: true}
	gone, left := c.classify(k, c.belongsToKubeProxy)
	if !slices.Equal(gone, []kernel.ServerKey{idle}) || !slices.Equal(left, []kernel.ServerKey{busy}) || len(c.failed) > 0 {
		t.Errorf("%v go and %v stay, errors %v", gone, left, c.failed)
	}
	for _, o := range k.ops {
		if o.Key == foreign || o.Verb != kernel.SetDestination || o.Weight != 0 || o.Destination != a {
			t.Errorf("asked for %s", o)
		}
	}
	if len(k.ops) != 2 {
		t.Errorf("%d destinations were drained, want the two that got new connections", len(k.ops))
	}
}
