package ipvs

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"signalbox/proxier/plan"
)

// hasIPSet fails where sets are missing although the machine must have them.
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

// makePortSet makes a set of ports: the library would add a protocol, which the
// kernel refuses there.
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
		if v4, v6 := setName(c.name, plan.IPv4), setName(c.name, plan.IPv6); v4 != c.v4 || v6 != c.v6 {
			t.Errorf("%s: %q and %q, want %q and %q", c.name, v4, v6, c.v4, c.v6)
		}
	}
}

// kube-proxy's sets of one family go, and those of others stay as they are.
func TestKubeProxySets(t *testing.T) {
	inNamespace(t)
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
		makeSet(t, setName("KUBE-CLUSTER-IP", f), "hash:ip,port", f, frontendEntry(vip[f]))
		makePortSet(t, setName("KUBE-NODE-PORT-UDP", f), f, 30053)
	}
	for _, f := range plan.Families {
		sets, err := readSets(f)
		if err != nil || len(sets) != 2 {
			t.Fatalf("%s: %+v, %v", f, sets, err)
		}
		named := func(key serverKey) bool {
			return slices.ContainsFunc(sets, func(s kubeProxySet) bool { return s.names(key) })
		}
		for key, want := range map[serverKey]bool{
			{addr: vip[f].Addr(), port: 443, protocol: plan.TCP}:   true,
			{addr: vip[f].Addr(), port: 443, protocol: plan.UDP}:   false,
			{addr: vip[f].Addr(), port: 80, protocol: plan.TCP}:    false,
			{addr: vip[f].Addr(), port: 30053, protocol: plan.UDP}: true,
			{addr: vip[f].Addr(), port: 30053, protocol: plan.TCP}: false,
		} {
			if named(key) != want {
				t.Errorf("%s: %s is kube-proxy's: %v, want %v", f, key, !want, want)
			}
		}
		if _, _, err := CleanupKubeProxy(f, false, false); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(before, save()); diff != "" {
		t.Errorf("(-before +after)\n%s", diff)
	}
}

// serversText is all that IPVS holds of a family.
func serversText(t *testing.T, k kernel) map[string][]destination {
	t.Helper()
	all, err := k.servers()
	if err != nil {
		t.Fatal(err)
	}
	text := make(map[string][]destination)
	for key := range all {
		if text[key.String()], err = k.dests(key); err != nil {
			t.Fatal(err)
		}
	}
	return text
}

// Exactly the virtual servers of kube-proxy's go: at addresses of the device,
// and at the node's own where a set of its NodePorts names them.
func TestCleanupKubeProxy(t *testing.T) {
	eachFamily(t, func(t *testing.T, w world) {
		hasIPSet(t)
		node, vip, alien := w.addr("192.0.2.200", "2001:db8::200"), w.addr("10.96.0.1", "fd00:96::1"), w.addr("203.0.113.9", "2001:db8::9")
		k, err := openKernel(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer k.close()
		dest := netip.AddrPortFrom(w.addr("10.244.0.5", "fd00:244::5"), 8080)
		serve := func(key serverKey) {
			t.Helper()
			for _, o := range []op{{verb: addServer, key: key, scheduler: "rr"}, {verb: addDest, key: key, dest: dest, weight: 1}} {
				if err := do(k, o); err != nil {
					t.Fatal(err)
				}
			}
		}
		serve(serverKey{mark: 7})
		serve(serverKey{addr: node, port: 80, protocol: plan.TCP})
		serve(serverKey{addr: node, port: 30080, protocol: plan.UDP})
		serve(serverKey{addr: alien, port: 30080, protocol: plan.TCP}) // of a keepalived on another node
		foreign := serversText(t, k)

		serve(serverKey{addr: vip, port: 443, protocol: plan.TCP})
		serve(serverKey{addr: node, port: 30080, protocol: plan.TCP})
		makeSet(t, setName("KUBE-CLUSTER-IP", w.family), "hash:ip,port", w.family, frontendEntry(netip.AddrPortFrom(vip, 443)))
		makePortSet(t, setName("KUBE-NODE-PORT-TCP", w.family), w.family, 30080)
		d, err := openDevice(w.family)
		if err != nil {
			t.Fatal(err)
		}
		defer d.close()
		if err := d.ensure(); err != nil {
			t.Fatal(err)
		}
		if err := d.add([]netip.Addr{vip}, func(netip.Addr) {}); err != nil {
			t.Fatal(err)
		}
		whole := serversText(t, k)

		// What is signalbox's alone is nothing here.
		if removed, err := Cleanup(w.family); err != nil || removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if diff := cmp.Diff(whole, serversText(t, k), cmp.AllowUnexported(destination{}), compareAddrPorts); diff != "" {
			t.Errorf("Cleanup changed what is kube-proxy's (-before +after)\n%s", diff)
		}
		// A mode that shares the device keeps what is at its addresses.
		if _, _, err := CleanupKubeProxy(w.family, true, false); err != nil {
			t.Fatal(err)
		}
		shared := maps.Clone(foreign)
		shared[serverKey{addr: vip, port: 443, protocol: plan.TCP}.String()] = foreign[serverKey{mark: 7}.String()]
		if diff := cmp.Diff(shared, serversText(t, k), cmp.AllowUnexported(destination{}), compareAddrPorts); diff != "" {
			t.Errorf("with the device shared (-want +got)\n%s", diff)
		}
		if removed, _, err := CleanupKubeProxy(w.family, false, true); err != nil || !removed {
			t.Fatalf("something was removed: %v, %v", removed, err)
		}
		if diff := cmp.Diff(foreign, serversText(t, k), cmp.AllowUnexported(destination{}), compareAddrPorts); diff != "" {
			t.Errorf("(-before +after)\n%s", diff)
		}
		if err := d.find(); err != nil || d.link != nil {
			t.Errorf("device %s is left: %v", deviceName, err)
		}
	})
}

var compareAddrPorts = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

// kernelWith plays IPVS with some virtual servers, and keeps what is asked of it.
type kernelWith struct {
	kernel
	all map[serverKey][]destination
	ops []op
}

func (k *kernelWith) servers() (map[serverKey]*server, error) {
	list := make(map[serverKey]*server)
	for key := range k.all {
		list[key] = &server{}
	}
	return list, nil
}

func (k *kernelWith) dests(key serverKey) ([]destination, error) { return k.all[key], nil }

func (k *kernelWith) send(ops []op, _ func(op)) error {
	k.ops = append(k.ops, ops...)
	return nil
}

// A virtual server that has connections gets no new ones, and waits for their
// end; one that has none can go.
func TestServersWithConnectionsStay(t *testing.T) {
	vip, node := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("192.0.2.200")
	busy := serverKey{addr: vip, port: 443, protocol: plan.TCP}
	idle := serverKey{addr: vip, port: 80, protocol: plan.TCP}
	foreign := serverKey{addr: node, port: 80, protocol: plan.TCP}
	a, b := netip.MustParseAddrPort("10.244.0.5:8080"), netip.MustParseAddrPort("10.244.0.6:8080")
	k := &kernelWith{all: map[serverKey][]destination{
		busy:    {{addr: a, weight: 1, connections: 2}, {addr: b, weight: 0}},
		idle:    {{addr: a, weight: 1}},
		foreign: {{addr: a, weight: 1, connections: 1}},
	}}
	c := cleanup{held: map[netip.Addr]bool{vip: true}, drain: true}
	gone, left := c.choose(k, c.theirs)
	if !slices.Equal(gone, []serverKey{idle}) || !slices.Equal(left, []serverKey{busy}) || len(c.failed) > 0 {
		t.Errorf("%v go and %v stay, errors %v", gone, left, c.failed)
	}
	for _, o := range k.ops {
		if o.key == foreign || o.verb != setDest || o.weight != 0 || o.dest != a {
			t.Errorf("asked for %s", o)
		}
	}
	if len(k.ops) != 2 {
		t.Errorf("%d destinations were set aside, want the two that got new connections", len(k.ops))
	}
}
