// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/node"
	"signalbox/proxier/plan"
)

// answersTable is the routing table that delivers every packet to this node. The
// kernel looks up only marked packets in it: the answers to transparent connections,
// which have the client's address.
const answersTable = 21314

// answersMark is the mark of answers: the masquerade mark and one bit more. During a
// change of mode, the rules of another mode or of kube-proxy set the masquerade mark
// alone on first packets of connections, which are no answers.
func answersMark(masquerade uint32) uint32 {
	if masquerade == 1 {
		return 3
	}
	return masquerade | 1
}

// answersPriority puts the rule behind the one for the local table and before all
// others.
const answersPriority = 83

// ruleName names the rule in messages.
var ruleName = fmt.Sprintf("rule %d for marked packets", answersPriority)

// routes are the relay's routes and its rule in the kernel.
type routes struct {
	family plan.Family
	mark   uint32
	handle *netlink.Handle

	// sourceMarks: src_valid_mark is set, so that the kernel looks up the source
	// addresses of marked packets in answersTable. It then drops answers as
	// packets that claim to come from this node.
	sourceMarks atomic.Bool

	mu sync.Mutex
	// wanted has repair add what is missing of the routes and the rule.
	wanted bool
	// left are the differences after the last repair. It cannot repair what other programs
	// put before the routes and the rule.
	left []string
}

// routeTimeout is how long to wait for the kernel: connections wait with it.
const routeTimeout = time.Second

// newRoutes works in the network namespace of the calling thread.
func newRoutes(f plan.Family, mark uint32) (*routes, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink to routing: %w", err)
	}
	if err := h.SetSocketTimeout(routeTimeout); err != nil {
		h.Close()
		return nil, fmt.Errorf("limit the wait for answers of routing: %w", err)
	}
	return &routes{family: f, mark: mark, handle: h}, nil
}

func (r *routes) close() { r.handle.Close() }

func (r *routes) number() int {
	if r.family == plan.IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// entries are the two routes, both by the loopback device, and the rule.
func (r *routes) entries() (own, answers *netlink.Route, rule *netlink.Rule, err error) {
	lo, err := r.handle.LinkByName("lo")
	if err != nil {
		return nil, nil, nil, fmt.Errorf("find the loopback device: %w", err)
	}
	link, prefix := lo.Attrs().Index, relayPrefixes[r.family]
	own = &netlink.Route{
		LinkIndex: link, Dst: ipNet(prefix), Table: unix.RT_TABLE_LOCAL,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: r.number(),
	}
	answers = &netlink.Route{
		LinkIndex: link, Dst: ipNet(netip.PrefixFrom(plan.Unspecified(r.family), 0)), Table: answersTable,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: r.number(),
	}
	rule = netlink.NewRule()
	rule.Family, rule.Table, rule.Priority = r.number(), answersTable, answersPriority
	rule.Mark, rule.Mask = r.mark, &r.mark
	return own, answers, rule, nil
}

// ensure adds the routes and the rule where they are missing, and has repair do
// so from now on.
func (r *routes) ensure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := r.add(); err != nil {
		return err
	}
	r.wanted = true
	r.readSourceMarks()
	return nil
}

// repair adds what another program has removed, and says what was missing: systemd-networkd
// removes all rules that it does not know whenever it starts.
func (r *routes) repair() (missing []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.wanted {
		return nil, nil
	}
	if missing, err = r.add(); err != nil {
		return missing, err
	}
	before := r.left
	r.left, _ = r.find() // after an error, the next look finds a difference
	if len(r.left) > 0 && !slices.Equal(r.left, before) {
		slog.Warn("userspace: rules or routes of another program come before the relay's; connections from their clients' addresses may hang, or all",
			"differences", r.left, "family", r.family.String())
	}
	return missing, nil
}

// stopRepairing leaves to another process what is removed from now on.
func (r *routes) stopRepairing() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wanted, r.left = false, nil
}

// add adds the routes and the rule that are missing, and says which these are.
func (r *routes) add() (missing []string, err error) {
	own, answers, rule, err := r.entries()
	if err != nil {
		return nil, err
	}
	var failed []error
	check := func(what string, err error) {
		switch {
		case err == nil:
			missing = append(missing, "the "+what+" is missing")
		case !errors.Is(err, unix.EEXIST):
			failed = append(failed, fmt.Errorf("add the %s: %w", what, err))
		}
	}
	check(fmt.Sprintf("route of %s to this node", own.Dst), r.handle.RouteAdd(own))
	check(fmt.Sprintf("route of table %d", answersTable), r.handle.RouteAdd(answers))
	check(ruleName, r.handle.RuleAdd(rule))
	return missing, errors.Join(failed...)
}

// elsewhere is an address of no host (RFC 5737, RFC 3849). Answers to all addresses have the
// same route.
var elsewhere = map[plan.Family]netip.Addr{plan.IPv4: netip.MustParseAddr("192.0.2.1"), plan.IPv6: netip.MustParseAddr("2001:db8::1")}

// differ says whether there are other differences than the last repair left.
func (r *routes) differ() (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	found, err := r.find()
	return err == nil && !slices.Equal(found, r.left), err
}

// differences says what differs from the relay's routes and its rule.
func (r *routes) differences() ([]string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.find()
}

// find names the packets that do not take the relay's routes. It asks the kernel as packets
// do, so that rules of other programs count, too. Behind such a rule, it looks for its own.
func (r *routes) find() (found []string, err error) {
	if !r.wanted {
		return nil, nil
	}
	own, answers, _, err := r.entries()
	if err != nil {
		return nil, err
	}
	for _, packets := range []struct {
		what string
		to   netip.Addr
		mark uint32
		take *netlink.Route
	}{
		{fmt.Sprintf("packets to %s", own.Dst), relayPrefixes[r.family].Addr().Next(), 0, own},
		{fmt.Sprintf("packets with the mark %#x", r.mark), elsewhere[r.family], r.mark, answers},
	} {
		have, err := r.handle.RouteGetWithOptions(packets.to.AsSlice(), &netlink.RouteGetOptions{Mark: packets.mark, FIBMatch: true})
		if err != nil && !slices.ContainsFunc(noRoute, func(errno error) bool { return errors.Is(err, errno) }) {
			return nil, fmt.Errorf("find the route of %s: %w", packets.what, err)
		}
		if len(have) == 0 || have[0].Type != packets.take.Type || have[0].Table != packets.take.Table || have[0].LinkIndex != packets.take.LinkIndex {
			found = append(found, fmt.Sprintf("%s do not take the route local %s dev lo table %d", packets.what, packets.take.Dst, packets.take.Table))
		}
	}
	rules, err := r.rules()
	switch {
	case err != nil || slices.ContainsFunc(rules, func(rule netlink.Rule) bool { return rule.Mark == r.mark }):
		return found, err
	case len(rules) > 0: // a signalbox with another mark begins to serve; see removeOthers
		return nil, nil
	}
	return append(found, "the "+ruleName+" is missing"), nil
}

// rules lists the rules for answers, with any mark.
func (r *routes) rules() ([]netlink.Rule, error) {
	found, err := node.Whole(func() ([]netlink.Rule, error) {
		return r.handle.RuleListFiltered(r.number(), &netlink.Rule{Table: answersTable, Priority: answersPriority},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	})
	if err != nil {
		return nil, fmt.Errorf("list the rules for marked packets: %w", err)
	}
	return found, nil
}

// noRoute are the kernel's answers for no route, and for blackhole, prohibit and unreachable
// routes.
var noRoute = []error{unix.ENETUNREACH, unix.EINVAL, unix.EACCES, unix.EHOSTUNREACH}

// removeOthers removes the rules for answers with another mark, of an earlier
// configuration.
func (r *routes) removeOthers() error {
	found, err := r.rules()
	if err != nil {
		return err
	}
	var failed []error
	for i := range found {
		if rule := &found[i]; rule.Mark != r.mark {
			rule.Family = r.number()
			if err := r.handle.RuleDel(rule); err != nil && !errors.Is(err, unix.ENOENT) {
				failed = append(failed, fmt.Errorf("remove the rule for packets with the mark %#x: %w", rule.Mark, err))
			}
		}
	}
	return errors.Join(failed...)
}

// try adds a route in a table that no rule uses, and removes it.
func (r *routes) try() error {
	_, route, _, err := r.entries()
	if err != nil {
		return err
	}
	route.Table = answersTable + 1
	if err := r.handle.RouteReplace(route); err != nil {
		return err
	}
	return r.handle.RouteDel(route)
}

// remove removes the routes and the rules; it is no error if there are none.
func (r *routes) remove() (removed bool, err error) {
	own, answers, rule, err := r.entries()
	if err != nil {
		return false, err
	}
	rule.Mark, rule.Mask = 0, nil // whatever bit it was
	var ruleErr error
	for ruleErr == nil { // there may be several, with different marks
		ruleErr = r.handle.RuleDel(rule)
		removed = removed || ruleErr == nil
	}
	var failed []error
	for _, err := range []error{ruleErr, r.handle.RouteDel(answers), r.handle.RouteDel(own)} {
		removed = removed || err == nil
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
			failed = append(failed, err)
		}
	}
	return removed, errors.Join(failed...)
}

// onDifferentLinks says whether client and endpoint are on different links and
// neither is this node itself. Only then do packets from endpoint to client pass
// through this node's IP layer, where the relay can receive them. It is false, too,
// where the kernel would drop the answers because of src_valid_mark.
func (r *routes) onDifferentLinks(client, endpoint netip.Addr) bool {
	if client == endpoint || r.sourceMarks.Load() {
		return false
	}
	a, aOK := r.link(client)
	b, bOK := r.link(endpoint)
	return aOK && bOK && a != b
}

// link is the one that packets to an address leave by; false for this node's own
// addresses, and where the kernel knows no route.
func (r *routes) link(a netip.Addr) (index int, ok bool) {
	found, err := r.handle.RouteGet(a.AsSlice())
	if err != nil || len(found) == 0 || found[0].Type == unix.RTN_LOCAL {
		return 0, false
	}
	return found[0].LinkIndex, true
}

// readSourceMarks reads src_valid_mark of the interfaces in the calling thread's
// network namespace. wg-quick sets it for all. Only IPv4 has it.
func (r *routes) readSourceMarks() {
	if r.family != plan.IPv4 {
		return
	}
	files, _ := filepath.Glob("/proc/sys/net/ipv4/conf/*/src_valid_mark")
	on := slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		return err == nil && strings.TrimSpace(string(text)) != "0"
	})
	if was := r.sourceMarks.Swap(on); on && !was {
		slog.Warn("userspace: net.ipv4.conf.*.src_valid_mark is set, as WireGuard's wg-quick does; endpoints see the node's address in place of their clients'")
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
