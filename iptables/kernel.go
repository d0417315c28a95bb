// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"signalbox/internal/xtables"
	"signalbox/node"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// This file asks the kernel what it can do and how full its lists are, and makes
// its settings.

// probeChain is added and removed again to learn what the kernel can do.
const probeChain = clusterPrefix + "PROBE"

// feature is something that rules use.
type feature struct {
	name  string
	table table
	rule  string
}

// features are what rules always use. A protocol may be missing without harm
// to others.
func features(f plan.Family) []feature {
	endpoint := map[plan.Family]string{plan.IPv4: "192.0.2.1:1", plan.IPv6: "[2001:db8::1]:1"}[f]
	return []feature{
		{"the match addrtype (xt_addrtype)", nat, fromNode + " -j RETURN"},
		{"the match comment (xt_comment)", nat, comment("probe") + " -j RETURN"},
		{"the match mark (xt_mark)", nat, " -m mark --mark 0x4000/0x4000 -j RETURN"},
		{"the match statistic (xt_statistic)", nat, " -m statistic --mode random --probability 0.5 -j RETURN"},
		{"the match recent (xt_recent)", nat, " -m recent --name " + probeChain + " --rcheck --seconds 1 --reap --rsource -j RETURN"},
		{"the target MARK (xt_mark)", nat, " -j MARK --or-mark 0x4000"},
		{"the target DNAT (xt_nat)", nat, " -p tcp -j DNAT --to-destination " + endpoint},
		{"the target MASQUERADE (xt_MASQUERADE)", nat, " -j MASQUERADE"},
		{"the match conntrack (xt_conntrack)", filter, " -m conntrack --ctstate NEW -j RETURN"},
		{"the target REJECT (ipt_REJECT, ip6t_REJECT)", filter, " -j REJECT"},
	}
}

// Supported implements proxier.Mode. If the kernel holds the rules of an earlier
// process, they are the answer. Otherwise the probe adds an unused chain for a
// moment.
func (Dataplane) Supported(f plan.Family) error {
	if f == plan.IPv6 {
		if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
			return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "IPv6 in the kernel", Remedy: "start the kernel without ipv6.disable=1", Err: err}
		}
	}
	ctx := context.Background()
	t, _, err := xtables.Choose(ctx, f, "")
	if err != nil {
		return err
	}
	if written, err := wrote(ctx, t); err == nil && written {
		return nil
	}
	return probe(t, features(f))
}

// probe tries all features at once, and each of them if the kernel refuses.
func probe(t *xtables.Tools, all []feature) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*t.Wait+30*time.Second)
	defer cancel()
	refused := tryRules(ctx, t, all...)
	if refused == nil {
		return nil
	}
	unsupported := &proxier.UnsupportedError{Mode: Mode, Family: t.Family, Missing: "a working " + t.Restore, Err: refused}
	for _, f := range all {
		err := tryRules(ctx, t, f)
		if err == nil {
			continue
		}
		unsupported.Missing, unsupported.Remedy, unsupported.Err = f.name, "load the module or choose another mode", err
		switch {
		case errors.Is(err, xtables.ErrNotPermitted):
			unsupported.Missing, unsupported.Remedy = "the capability CAP_NET_ADMIN", "run as root or give it to the container"
		case errors.Is(err, xtables.ErrNoLock):
			unsupported.Missing, unsupported.Remedy = "the lock /run/xtables.lock", "mount the host's file into the container, or let this process write to /run"
		default:
			if err := tryRules(ctx, t, feature{table: f.table, rule: " -j RETURN"}); err != nil {
				unsupported.Missing, unsupported.Err = fmt.Sprintf("the table %s of the %s variant", f.table, t.Backend), err
			}
		}
		break
	}
	return unsupported
}

// tryRules lets the kernel check rules in a chain that nothing jumps to.
func tryRules(ctx context.Context, t *xtables.Tools, tried ...feature) error {
	var rules [tableCount][]string
	for _, f := range tried {
		rules[f.table] = append(rules[f.table], f.rule)
	}
	var try, remove xtables.Script
	for table := range tableCount {
		if len(rules[table]) > 0 {
			try.Add(table.String(), []chain{{Name: probeChain, Rules: rules[table]}})
			remove.Add(table.String(), []chain{xtables.Removal(probeChain)})
		}
	}
	err := t.Apply(ctx, try)
	if removeErr := t.Apply(ctx, remove); err == nil {
		err = removeErr
	}
	return err
}

// tryNetlink lets changes of chains go to the kernel without the tools, if it can.
func (p *Proxier) tryNetlink(ctx context.Context) {
	if err := p.tools.UseNetlink(ctx, p.log, probeChain, ruleForms(p.opts.Family)); err != nil {
		p.log.DebugContext(ctx, "the iptables tools write all changes, not netlink", "family", p.opts.Family.String(), "error", err)
	}
}

// ruleForms are examples of all rules that this mode writes. The match on ports of SCTP
// is not among them: a kernel without it serves the other protocols.
func ruleForms(f plan.Family) map[string][]string {
	address, prefix, wholeBytes, digit, endpoint := "192.0.2.1", "192.0.2.0/23", "192.0.2.0/24", "0.0.0.3/0.0.0.15", "192.0.2.1:8080"
	if f == plan.IPv6 {
		address, prefix, wholeBytes, digit, endpoint = "2001:db8::1", "2001:db8::/33", "2001:db8::/64", "::3/::f", "[2001:db8::1]:8080"
	}
	const toChain = " -j " + probeChain
	single := netip.MustParseAddr(address)
	recent := " -m recent --name " + probeChain
	dnat := " -j DNAT --to-destination " + endpoint
	return map[string][]string{
		nat.String(): {
			fromNode + " -j RETURN", notFromNode + toChain, " -m addrtype ! --dst-type LOCAL" + toChain,
			destination(single) + " -p tcp -m tcp --dport 80" + comment("two words") + toChain,
			" -d " + digit + " -p udp -m udp --dport 4096:8191 -g " + probeChain,
			" -s " + prefix + " -j RETURN", " ! -s " + wholeBytes + " -j RETURN",
			" -i eth0 -j RETURN", " ! -i eth0 -j RETURN", " -i veth+ -j RETURN", " ! -i veth+ -j RETURN",
			" -o eth0 -d " + prefix + " -j SNAT --to-source " + address + randomFully,
			" -p tcp" + chance(1, 3) + dnat,
			recent + " --rcheck --seconds 10800 --reap --rsource" + toChain,
			" -p udp" + recent + " --set --rsource" + dnat,
			" -j MARK --or-mark 0x4000", " -m mark ! --mark 0x4000/0x4000 -j RETURN", " -j MARK --xor-mark 0x4000",
			source(single) + " ! -d " + prefix + comment("word") + " -m conntrack --ctstate DNAT ! --ctorigsrc " + wholeBytes + " -j MASQUERADE" + randomFully,
		},
		filter.String(): {
			" -m conntrack --ctstate INVALID -j DROP",
			comment("two words") + " -m mark --mark 0x4000/0x4000 -j ACCEPT",
			comment("two words") + " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			" -m conntrack --ctstate DNAT --ctstatus CONFIRMED -j ACCEPT",
			" -m addrtype --dst-type LOCAL" + toChain,
			" -j REJECT",
			destination(single) + " -p tcp -m tcp --dport 80" + midStream + comment("word") + rejectReset,
		},
	}
}

// dropInvalid asks the kernel: see staticChains.
func dropInvalid() bool {
	liberal, err := node.Sysctl("net/netfilter/nf_conntrack_tcp_be_liberal")
	return err != nil || liberal == "0"
}

// The lists of the match recent in the network namespace of this thread, and how
// many clients the kernel keeps on each.
const (
	recentLists = "/proc/thread-self/net/xt_recent"
	recentLimit = "/sys/module/xt_recent/parameters/ip_list_tot"
)

// FullAffinityLists implements proxier.Mode. If a list is full and one more client
// with session affinity connects, the client that was quiet for longest may get
// another endpoint. It reads every list, a few kilobytes each.
func (Dataplane) FullAffinityLists() (full int, err error) {
	text, err := os.ReadFile(recentLimit)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // without the module there is no list
	}
	limit, parseErr := strconv.Atoi(strings.TrimSpace(string(text)))
	if err = errors.Join(err, parseErr); err != nil {
		return 0, fmt.Errorf("reading how many clients of session affinity the kernel keeps: %w", err)
	}
	lists, err := filepath.Glob(filepath.Join(recentLists, endpointPrefix+"*"))
	if err != nil {
		return 0, err
	}
	for _, list := range lists {
		clients, err := os.ReadFile(list)
		switch {
		case errors.Is(err, fs.ErrNotExist): // its endpoint has gone meanwhile
		case err != nil:
			return 0, fmt.Errorf("counting the clients of session affinity: %w", err)
		case bytes.Count(clients, []byte("\n")) >= limit:
			full++
		}
	}
	return full, nil
}

// Init implements proxier.Mode. It makes the kernel setting that NodePorts on
// 127.0.0.1 need, if these are wanted. A Proxier then finds it made and does not
// need the right to make it.
func (Dataplane) Init(opts proxier.Options, localhost bool) error {
	p, err := New(opts)
	if err != nil {
		return err
	}
	err = p.prepareNode(&plan.Node{LocalhostNodePorts: localhost})
	return errors.Join(err, node.JoinProblems(p.problems), p.Close())
}

const routeLocalnet = "net/ipv4/conf/all/route_localnet"

// prepareNode makes the kernel route packets between NodePorts on 127.0.0.1
// and Pods, if these are wanted. It is never undone: other software may need
// it by then. If the setting cannot be made, everything else is served.
func (p *Proxier) prepareNode(wanted *plan.Node) error {
	open := p.opensLoopback(wanted)
	p.loopbackOpen.Store(open)
	if !open {
		p.problems = nil
		return nil
	}
	client, err := p.tools.Client()
	if err != nil {
		return err
	}
	// Before the kernel is opened.
	written, err := addLocalnetFirewall(client)
	p.tools.Wrote(written)
	if err != nil {
		return err
	}
	p.problems = nil
	if problem := node.SetSysctl(routeLocalnet, "1", "NodePorts are not served on 127.0.0.1"); problem != nil {
		p.problems = []*node.KernelProblem{problem}
	}
	return nil
}

// opensLoopback says whether the kernel routes packets of other hosts to 127.0.0.1.
func (p *Proxier) opensLoopback(n *plan.Node) bool {
	return n.LocalhostNodePorts && p.opts.Family == plan.IPv4
}

// firewallRule keeps other hosts from talking to 127.0.0.1, which the kernel
// allows once route_localnet is set. It is the kubelet's rule, byte by byte,
// so that each finds the other's.
var firewallRule = []string{
	"-m", "comment", "--comment", "block incoming localnet connections",
	"--dst", "127.0.0.0/8", "!", "--src", "127.0.0.0/8",
	"-m", "conntrack", "!", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "DROP",
}

// addLocalnetFirewall adds firewallRule to the chain shared with the kubelet. It returns the
// number of chains and rules that it added.
func addLocalnetFirewall(client *iptables.IPTables) (added int, err error) {
	table := filter.String()
	add := func(exists bool, checked error, write func() error) {
		if err = checked; err != nil || exists {
			return
		}
		if err = write(); err == nil {
			added++
		}
	}
	exists, checked := client.ChainExists(table, firewallChain)
	add(exists, checked, func() error { return client.NewChain(table, firewallChain) })
	if err == nil {
		exists, checked = client.Exists(table, firewallChain, firewallRule...)
		add(exists, checked, func() error { return client.Append(table, firewallChain, firewallRule...) })
	}
	for _, from := range []string{"OUTPUT", "INPUT"} {
		if err == nil {
			exists, checked = client.Exists(table, from, "-j", firewallChain)
			add(exists, checked, func() error { return client.Insert(table, from, 1, "-j", firewallChain) })
		}
	}
	if err != nil {
		return added, fmt.Errorf("chain %s: %w", firewallChain, err)
	}
	return added, nil
}

// hasLocalnetFirewall says whether the rules of addLocalnetFirewall are there.
func hasLocalnetFirewall(client *iptables.IPTables) (bool, error) {
	table := filter.String()
	exists, err := client.ChainExists(table, firewallChain)
	if err != nil || !exists {
		return false, err
	}
	exists, err = client.Exists(table, firewallChain, firewallRule...)
	for _, from := range []string{"OUTPUT", "INPUT"} {
		if err == nil && exists {
			exists, err = client.Exists(table, from, "-j", firewallChain)
		}
	}
	return exists, err
}

// KernelProblems implements proxier.Proxier. The next Sync that writes everything
// tries again.
func (p *Proxier) KernelProblems() []*node.KernelProblem { return p.problems }
