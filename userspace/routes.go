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

	"signalbox/proxier"
)

// answersTable is the routing table that makes a packet to anybody one for this
// node. Only packets with the mark are looked up in it: the answers to
// connections that bear their client's address.
const answersTable = 21314

// answersMark is what answers are marked with: the masquerade mark and one bit
// more. Another mode's rules, or kube-proxy's, which are there for a while when a
// node changes from one to the other, mark the first packets of connections with
// the masquerade mark alone; those must not be taken for answers.
func answersMark(masquerade uint32) uint32 {
	if masquerade == 1 {
		return 3
	}
	return masquerade | 1
}

// answersPriority puts the rule behind the one for the node's own addresses
// and before everybody's.
const answersPriority = 83

// routes holds what the relay needs of the kernel's routing.
type routes struct {
	family proxier.Family
	mark   uint32
	handle *netlink.Handle

	// sourceMarks says that the kernel looks up senders with the mark of their
	// packets. It then takes answers, which are marked, for packets of its own
	// that come from elsewhere, and drops them.
	sourceMarks atomic.Bool

	mu sync.Mutex
	// wanted has restore add what is missing of the routes and the rule.
	wanted bool
}

// routeTimeout is how long the kernel's answer is waited for: connections wait
// with it.
const routeTimeout = time.Second

// newRoutes works in the network namespace of the calling thread.
func newRoutes(f proxier.Family, mark uint32) (*routes, error) {
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
	if r.family == proxier.IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// entries are the two routes, which are by the loopback device, and the rule.
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
		LinkIndex: link, Dst: ipNet(netip.PrefixFrom(unspecified(r.family), 0)), Table: answersTable,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: r.number(),
	}
	rule = netlink.NewRule()
	rule.Family, rule.Table, rule.Priority = r.number(), answersTable, answersPriority
	rule.Mark, rule.Mask = r.mark, &r.mark
	return own, answers, rule, nil
}

// ensure adds the routes and the rule where they are missing, and has restore do
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

// restore adds what another program has removed: systemd-networkd removes all rules
// that it does not know whenever it starts.
func (r *routes) restore() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.wanted {
		return nil
	}
	added, err := r.add()
	for _, what := range added {
		slog.Warn("userspace: another program removed what the relay needs of the kernel's routing; signalbox added it again",
			"what", what, "family", r.family.String())
	}
	return err
}

// stopRestoring leaves to another process what is removed from now on.
func (r *routes) stopRestoring() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wanted = false
}

// add adds the routes and the rule that are missing, and says which these are.
func (r *routes) add() (added []string, err error) {
	own, answers, rule, err := r.entries()
	if err != nil {
		return nil, err
	}
	var failed []error
	check := func(what string, err error) {
		switch {
		case err == nil:
			added = append(added, what)
		case !errors.Is(err, unix.EEXIST):
			failed = append(failed, fmt.Errorf("add the %s: %w", what, err))
		}
	}
	check(fmt.Sprintf("route of %s to this node", own.Dst), r.handle.RouteAdd(own))
	check(fmt.Sprintf("route of table %d", answersTable), r.handle.RouteAdd(answers))
	check(fmt.Sprintf("rule %d for marked packets", answersPriority), r.handle.RuleAdd(rule))
	return added, errors.Join(failed...)
}

// removeOthers takes away the rules for answers with another mark, which an
// earlier configuration had.
func (r *routes) removeOthers() error {
	found, err := r.handle.RuleListFiltered(r.number(), &netlink.Rule{Table: answersTable, Priority: answersPriority},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	if err != nil {
		return fmt.Errorf("list the rules for marked packets: %w", err)
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

// try makes a route to this node in a table that nothing is looked up in, and
// removes it.
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

// remove takes away what ensure made; what is not there is no error.
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

// readSourceMarks finds out whether src_valid_mark is set on any interface of
// the calling thread's network namespace, as wg-quick sets it on all. Only IPv4
// has it.
func (r *routes) readSourceMarks() {
	if r.family != proxier.IPv4 {
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
