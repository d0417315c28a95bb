// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/ipvs/internal/kernel"
	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Mode is the name of this mode on the command line and in messages.
const Mode = "ipvs"

// Dataplane is the ipvs mode.
type Dataplane struct{ proxier.ModeDefaults }

var _ proxier.Mode = Dataplane{}

// Name implements proxier.Mode.
func (Dataplane) Name() string { return Mode }

// New implements proxier.Mode.
func (Dataplane) New(o proxier.Options) (proxier.Proxier, error) { return New(o) }

// Written implements proxier.Mode.
func (Dataplane) Written(f plan.Family) (found bool, taken proxier.TakenOver, err error) {
	found, err = access.HasTable(f, tableName)
	return found, proxier.TakenOver{IPVS: true}, err
}

// Traits implements proxier.Mode. IPVS has no transactions, so two processes do not notice
// each other. The earlier process removes virtual servers that have drained.
func (Dataplane) Traits() proxier.Traits {
	return proxier.Traits{
		FileSection:            "ipvs",
		FeatureGate:            "KubeProxyIPVS",
		Series:                 []string{"sync_proxy_rules_iptables_restore_failures_total"},
		Schedulers:             true,
		GuardsClusterIPs:       true,
		LeavesAPIServers:       true,
		FullWriteAfterTakeover: true,
	}
}

// Supported implements proxier.Mode. It asks the kernel for each feature by using it.
func (Dataplane) Supported(f plan.Family) error {
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
	rules := newRuleset(nft.FamilyOf(f), proxier.DefaultMasqueradeMark, plan.Node{NodePortAddrs: plan.NodePortAddrs{All: true}}, []time.Duration{time.Second})
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

// Init implements proxier.Mode. It makes the device and the kernel settings. A Proxier that
// finds them needs no right to make them.
func (Dataplane) Init(opts proxier.Options, _ bool) error {
	p, err := New(opts)
	if err != nil {
		return err
	}
	return errors.Join(p.prepare(), node.JoinProblems(p.problems), p.Close())
}

// Render implements proxier.Mode. The text is the input of `ip -batch`, `ipvsadm --restore`
// and `nft -f`. It is the result of a first Sync on a node that has none of the Services'
// addresses on another device.
func (Dataplane) Render(opts proxier.Options, desired *plan.Plan) (string, error) {
	f := nft.FamilyOf(opts.Family)
	rules := newRuleset(f, opts.MasqueradeMark, desired.Node, affinityTimeouts(nil, desired.Services))
	st := newState(rules)
	c := &compiler{
		IPFamily: f, schedulers: newSchedulerChoice(opts.IPVS.Scheduler, anyScheduler), marks: st.marks, rules: rules,
		endpointMarks: st.endpointMarks, foreign: func(netip.Addr) bool { return false },
	}
	names := desired.Names()
	if err := access.ValidateNode(f, desired.Node); err != nil {
		return "", err
	}
	records, err := c.compile(desired, names)
	if err != nil {
		return "", err
	}
	b := st.compare(names, records)
	var out strings.Builder
	fmt.Fprintf(&out, "# ip -batch\nlink add %s type dummy\n", kernel.DeviceName)
	slices.SortFunc(b.newAddrs, netip.Addr.Compare)
	for _, a := range b.newAddrs {
		fmt.Fprintf(&out, "addr add %s/%d dev %s\n", a, a.BitLen(), kernel.DeviceName)
	}
	out.WriteString("\n# ipvsadm --restore\n")
	text := kernel.OpsText(b.additions)
	if opts.Family == plan.IPv6 {
		text = strings.NewReplacer(" -s ", " -6 -s ", " -r ", " -6 -r ").Replace(text)
	}
	out.WriteString(text + "\n# nft -f\n")
	elements := bySet(slices.Concat(rules.NodeElements(), vipElements(b.newAddrs), b.Add))
	out.WriteString(nft.RenderTable(f, tableName, nil, newSets(), elements, rules.chains()))
	return out.String(), nil
}

// Cleanup implements proxier.Mode. Virtual servers of other software stay. If kube-proxy's
// ipsets show that kube-proxy serves in its ipvs mode, the device and the servers at its
// addresses stay, too. A connection ends with its virtual server.
func (Dataplane) Cleanup(f plan.Family, drain bool) (removed bool, draining int, err error) {
	d, err := findDevice(f)
	if err != nil {
		return false, 0, err
	}
	defer d.Close()
	c := cleanup{device: d, drain: drain}
	if kernel.HasKubeProxySets(f) {
		c.sharesDevice = true
	} else if d.Exists() {
		if c.onDevice, _, err = d.Addresses(); err != nil {
			return false, 0, err
		}
	}
	draining = c.removeServers(f, func(key kernel.ServerKey) bool {
		return isOurs(key.Mark) || key.Mark == 0 && c.onDevice[key.Addr]
	})
	removedTable, err := access.DropTable(f, tableName)
	c.removed = c.removed || removedTable
	c.fail(err)
	removedProbe, err := d.RemoveProbe()
	c.removed = c.removed || removedProbe
	c.fail(err)
	return c.removed, draining, errors.Join(c.failed...)
}

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
