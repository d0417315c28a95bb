package ipvs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"signalbox/ipvs/internal/kernel"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Dataplane is the ipvs mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// Supported implements proxier.Mode.
func (Dataplane) Supported(f plan.Family) error { return Supported(f) }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Render implements proxier.Mode.
func (Dataplane) Render(o proxier.Options, p *plan.Plan) (string, error) { return Render(o, p), nil }

// Cleanup implements proxier.Mode. A connection ends with its virtual server.
func (Dataplane) Cleanup(f plan.Family, drain bool) (removed bool, draining int, err error) {
	return leave(f, drain)
}

// Init implements proxier.Mode.
func (Dataplane) Init(o proxier.Options, _ bool) error { return Init(o) }

// KubeProxy implements proxier.Mode.
func (Dataplane) KubeProxy() []proxier.Remnant {
	return []proxier.Remnant{{
		What:  "kube-proxy's IPVS servers, addresses and ipsets",
		Found: func(_ context.Context, f plan.Family, _ proxier.TakenOver) bool { return kernel.HasKubeProxySets(f) },
		Remove: func(f plan.Family, taken proxier.TakenOver, drain bool) (removed bool, draining int, err error) {
			return cleanupKubeProxy(f, taken.IPVS, drain)
		},
	}}
}

// Traits implements proxier.Mode. IPVS has no transactions, by which two processes
// could notice each other, and an earlier process ends virtual servers that have
// drained.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		FileSection:          "ipvs",
		FeatureGate:          "KubeProxyIPVS",
		Series:               []string{"sync_proxy_rules_iptables_restore_failures_total"},
		Schedulers:           true,
		RewriteAfterTakeover: true,
	}
}

// Supported says whether this node's kernel can do all that the mode needs, by
// asking it to. The error is a *proxier.UnsupportedError.
func Supported(f plan.Family) error {
	unsupported := func(missing, remedy string, err error) error {
		return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: missing, Remedy: remedy, Err: err}
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil && f == plan.IPv6 {
		return unsupported("IPv6 in the kernel", "start the kernel without ipv6.disable=1", err)
	}
	ipvs, err := kernel.OpenIPVS(f)
	if err != nil {
		return unsupported("IPVS (ip_vs)", "load the module ip_vs (modprobe ip_vs); the kernel needs CONFIG_IP_VS", err)
	}
	defer ipvs.Close()
	if err := kernel.ProbeDummy(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return unsupported("the right to change devices", "run as root or with CAP_NET_ADMIN", err)
		}
		return unsupported("dummy devices (dummy)", "load the module dummy; the kernel needs CONFIG_DUMMY", err)
	}
	rules := rulesetOf(nft.FamilyOf(f), proxier.DefaultMasqueradeMark, plan.Node{NodePortAddrs: plan.NodePortAddrs{All: true}}, []time.Duration{time.Second})
	if err := access.Supported(Mode, f, newSets(), rules.chains()); err != nil {
		return err
	}
	has, err := ipvs.HasScheduler(defaultScheduler)
	if err == nil && !has {
		err = kernel.ErrNoScheduler(defaultScheduler)
	}
	if err != nil {
		return unsupported(fmt.Sprintf("IPVS for %s with the scheduler %s", f, defaultScheduler), "the kernel needs CONFIG_IP_VS_RR, and for IPv6 CONFIG_IP_VS_IPV6", err)
	}
	return nil
}

// Cleanup removes this mode's table, its virtual servers and their addresses,
// of one family, and the device with the last address. Virtual servers of other
// software stay, and where kube-proxy's sets say that it serves in its ipvs
// mode, so do the addresses and what is at them. It is no error if there is
// nothing, and then removed is false.
func Cleanup(f plan.Family) (removed bool, err error) {
	removed, _, err = leave(f, false)
	return removed, err
}

// leave is Cleanup. With drain, a virtual server that has connections gets no new
// ones and stays, with the addresses, and the function is to be called again later.
// draining is how many do.
func leave(f plan.Family, drain bool) (removed bool, draining int, err error) {
	d, err := kernel.OpenDevice(f)
	if err != nil {
		return false, 0, err
	}
	defer d.Close()
	if err := d.Find(); err != nil {
		return false, 0, err
	}
	c := cleanup{device: d, drain: drain}
	if kernel.HasKubeProxySets(f) {
		c.sharesDevice = true // with kube-proxy, whose it is now
	} else if d.Exists() {
		if c.held, _, err = d.Addresses(); err != nil {
			return false, 0, err
		}
	}
	draining = c.removeServers(f, func(key kernel.ServerKey) bool {
		return isOurs(key.Mark) || key.Mark == 0 && c.held[key.Addr]
	})
	t, err := nft.Open(nft.FamilyOf(f), tableName, nil)
	if err != nil {
		return c.removed, draining, errors.Join(append(c.failed, err)...)
	}
	defer t.Close()
	table := t.DeleteTable()
	if err := access.Commit(t); err != nil {
		c.fail(fmt.Errorf("delete table %s of %s: %w", tableName, f, err))
	} else {
		c.removed = c.removed || table
	}
	return c.removed, draining, errors.Join(c.failed...)
}

// Init makes the device and the kernel settings that the mode needs, so that a
// Proxier finds them made and needs no right to them.
func Init(opts proxier.Options) error {
	p, err := New(opts)
	if err != nil {
		return err
	}
	return errors.Join(p.prepare(), node.JoinProblems(p.problems), p.Close())
}

// Render prints what New and one Sync would make of plan on a node that holds
// none of the Services' addresses itself, as what `ip -batch`, `ipvsadm
// --restore` and `nft -f` read. It touches no kernel. A plan that Sync would
// refuse renders as a comment that says why.
func Render(opts proxier.Options, desired *plan.Plan) string {
	f := nft.FamilyOf(opts.Family)
	rules := rulesetOf(f, opts.MasqueradeMark, desired.Node, timeoutsOf(desired))
	st := newState(rules)
	st.others = map[netip.Addr]bool{}
	p := &Proxier{IPFamily: f, mark: opts.MasqueradeMark, schedulers: newSchedulerChoice(opts.IPVS.Scheduler, anyScheduler)}
	err := access.ValidateNode(rules.IPFamily, rules.Node)
	var b *batch
	if err == nil {
		names := slices.SortedFunc(maps.Keys(desired.Services), plan.ServicePortName.Compare)
		b, err = st.stage(desired, names, p.compiler(st, func(markKey) uint32 { return 0 }))
	}
	if err != nil {
		return fmt.Sprintf("# cannot be programmed: %v\n", err)
	}
	var out strings.Builder
	fmt.Fprintf(&out, "# ip -batch\nlink add %s type dummy\n", kernel.DeviceName)
	slices.SortFunc(b.newVIPs, netip.Addr.Compare)
	for _, a := range b.newVIPs {
		fmt.Fprintf(&out, "addr add %s/%d dev %s\n", a, a.BitLen(), kernel.DeviceName)
		b.add = append(b.add, vipElement(a))
	}
	out.WriteString("\n# ipvsadm --restore\n")
	text := kernel.OpsText(b.grow)
	if opts.Family == plan.IPv6 {
		text = strings.ReplaceAll(text, " -s ", " -6 -s ")
		text = strings.ReplaceAll(text, " -r ", " -6 -r ")
	}
	out.WriteString(text + "\n# nft -f\n")
	elements := bySet(append(rules.NodeElements(), b.add...))
	out.WriteString(nft.RenderTable(f, tableName, nil, newSets(), elements, rules.chains()))
	return out.String()
}
