// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// examplePlan has a Service port of every kind.
func examplePlan(f plan.Family) *plan.Plan {
	addr := func(v4, v6 string) netip.Addr {
		if f == plan.IPv6 {
			return netip.MustParseAddr(v6)
		}
		return netip.MustParseAddr(v4)
	}
	prefix := func(v4, v6 string, bits4, bits6 int) netip.Prefix {
		if f == plan.IPv6 {
			return netip.PrefixFrom(netip.MustParseAddr(v6), bits6)
		}
		return netip.PrefixFrom(netip.MustParseAddr(v4), bits4)
	}
	here := &plan.EndpointSet{Endpoints: []plan.Endpoint{{AddrPort: netip.AddrPortFrom(addr("10.244.1.1", "fd00:244::1"), 8080)}}}
	all := &plan.EndpointSet{Endpoints: append(slices.Clone(here.Endpoints),
		plan.Endpoint{AddrPort: netip.AddrPortFrom(addr("10.244.2.1", "fd00:244::2"), 8080)})}
	none := &plan.EndpointSet{}
	vip := func(n int) netip.Addr {
		return addr(fmt.Sprintf("10.96.0.%d", n), fmt.Sprintf("fd00:96::%x", n))
	}
	desired := &plan.Plan{
		Family: f,
		Node: plan.Node{
			LocalPods:     plan.LocalPods{Prefixes: []netip.Prefix{prefix("10.244.1.0", "fd00:244::", 24, 64)}},
			NodePortAddrs: plan.NodePortAddrs{All: true}, LocalhostNodePorts: true,
			ServiceCIDRs: []netip.Prefix{prefix("10.96.0.0", "fd00:96::", 16, 112)},
		},
		Services: map[plan.ServicePortName]*plan.ServicePort{},
	}
	add := func(name string, p plan.Protocol, affinity time.Duration, frontends ...plan.Frontend) {
		n := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "shop", Name: name}, Port: "main", Protocol: p}
		desired.Services[n] = &plan.ServicePort{Name: n, AffinityTimeout: affinity, Frontends: frontends, Usable: all}
	}
	add("web", plan.TCP, time.Hour,
		plan.Frontend{Kind: plan.ClusterIP, Addr: vip(1), Port: 80, Internal: all, External: all, Masquerade: plan.FromOutside},
		plan.Frontend{Kind: plan.LoadBalancerIP, Addr: addr("203.0.113.1", "2001:db8::1"), Port: 80, Internal: all, External: here,
			Sources: []netip.Prefix{prefix("198.51.100.0", "2001:db8:1::", 24, 48)}},
		plan.Frontend{Kind: plan.NodePort, Port: 30080, Internal: all, External: none, WhenEmpty: plan.Drop})
	add("dns", plan.UDP, 0, plan.Frontend{Kind: plan.ClusterIP, Addr: vip(1), Port: 53, Internal: all, External: all})
	add("empty", plan.TCP, 0, plan.Frontend{Kind: plan.ClusterIP, Addr: vip(2), Port: 80, Internal: none, External: none})
	add("calls", plan.SCTP, 0, plan.Frontend{Kind: plan.ClusterIP, Addr: vip(3), Port: 2905, Internal: all, External: all})
	return desired
}

func TestRender(t *testing.T) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			got, err := Dataplane{}.Render(proxier.Options{Family: f, MasqueradeMark: proxier.DefaultMasqueradeMark}, examplePlan(f))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", f.String()+".nft")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the table differs from %s (-update rewrites it):\n%s", file, got)
			}
		})
	}
}

// TestChangesAddUp makes many small changes, some of which fail, and compares
// the kernel's sets with what one sync writes to an empty kernel.
func TestChangesAddUp(t *testing.T) {
	eachFamily(t, func(t *testing.T, w *world) {
		random := rand.New(rand.NewPCG(1, 2))
		full := examplePlan(w.family)
		w.plan.Node = full.Node
		w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
		names := full.Names()
		for range 300 {
			name := names[random.IntN(len(names))]
			if random.IntN(3) == 0 {
				delete(w.plan.Services, name)
			} else {
				w.plan.Services[name] = variantOf(full.Services[name], random)
			}
			if random.IntN(10) == 0 {
				w.fail(name)
			}
			w.must(w.p.Sync(t.Context(), w.plan, plan.Change{Services: []plan.ServicePortName{name}, Node: random.IntN(20) == 0}))
		}
		grown := w.contents()
		_, _, err := Dataplane{}.Cleanup(w.family, false)
		w.must(err)
		w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
		if fresh := w.contents(); grown != fresh {
			t.Errorf("after many changes:\n%s\nwritten at once:\n%s", grown, fresh)
		}
		if n := w.p.state.pool.InUse(); n != len(w.p.state.ids) {
			t.Errorf("%d numbers are taken, %d frontends have one", n, len(w.p.state.ids))
		}
		if n := len(w.p.relay.targets.byID); n != len(w.p.state.ids) {
			t.Errorf("the relay knows %d frontends, the table %d", n, len(w.p.state.ids))
		}
	})
}

// variantOf is the Service port with some frontends left out and some emptied.
func variantOf(sp *plan.ServicePort, random *rand.Rand) *plan.ServicePort {
	out := *sp
	out.Frontends = nil
	for _, fe := range sp.Frontends {
		switch random.IntN(4) {
		case 0:
			continue
		case 1:
			fe.Internal = &plan.EndpointSet{}
		case 2:
			fe.Sources = nil
		}
		out.Frontends = append(out.Frontends, fe)
	}
	return &out
}

// fail syncs a change that cannot be written.
func (w *world) fail(name plan.ServicePortName) {
	w.t.Helper()
	bad := plan.ServicePortName{ServiceName: plan.ServiceName{Namespace: "shop", Name: "bad"}, Protocol: plan.TCP}
	w.plan.Services[bad] = &plan.ServicePort{Name: bad, Frontends: []plan.Frontend{{Addr: netip.MustParseAddr("::ffff:1.2.3.4"), Port: 1}}}
	defer delete(w.plan.Services, bad)
	if err := w.p.Sync(w.t.Context(), w.plan, plan.Change{Services: []plan.ServicePortName{name, bad}}); err == nil {
		w.t.Error("an address of no family was written")
	}
}

// contents lists the table's sets without the numbers of frontends.
func (w *world) contents() string {
	w.t.Helper()
	var lines []string
	for set := range setCount {
		elements, err := w.p.table.Read(set)
		w.must(err)
		for _, e := range elements {
			lines = append(lines, fmt.Sprintf("%s %x-%x %v %q", setNames[set], e.Key, e.KeyEnd, e.IntervalEnd, e.Comment))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestNumbers(t *testing.T) {
	for _, f := range plan.Families {
		for _, id := range []frontendID{0, 1, 255, 256, 1<<idBits - 1} {
			a := id.addr(f)
			if got, ok := idOf(f, a); !ok || got != id || plan.FamilyOf(a) != f {
				t.Errorf("%d became %s and that %d, %v", id, a, got, ok)
			}
		}
		if id, ok := idOf(f, netip.MustParseAddr("192.0.2.1")); ok {
			t.Errorf("an address of somebody else became number %d", id)
		}
	}
}

// TestNumbersOutliveTheTable writes everything where the table cannot be read.
func TestNumbersOutliveTheTable(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.serve(0, 0, 0)
	w.serve(1, 0, 0)
	st := newState(w.p.family)
	w.p.adopt(st, w.plan, func(nft.SetID) ([]nftables.SetElement, error) { return nil, unix.EINTR })
	if !maps.Equal(st.ids, w.p.state.ids) {
		t.Errorf("frontends have the numbers %v, had %v", st.ids, w.p.state.ids)
	}
}

// TestNumbersGoOn gives numbers back before everything is written again.
func TestNumbersGoOn(t *testing.T) {
	w := newWorld(t, plan.IPv4)
	w.serve(0, 0, 0)
	w.serve(1, 0, 0)
	before := w.p.state.pool.Next()
	w.remove(1)
	w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
	if next := w.p.state.pool.Next(); next != before {
		t.Errorf("the next number is %d, was %d: numbers that came free are given again at once", next, before)
	}
}

func TestFamiliesOfAddressesAreChecked(t *testing.T) {
	good := examplePlan(plan.IPv4)
	for name, sp := range good.Services {
		if err := access.ValidatePort(nft.FamilyOf(plan.IPv4), sp); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := access.ValidatePort(nft.FamilyOf(plan.IPv6), sp); err == nil {
			t.Errorf("%s: IPv4 addresses pass for IPv6", name)
		}
	}
}
