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

	// keep guards the rule and the routes while they are made or put back; kept
	// says that they are wanted.
	keep sync.Mutex
	kept bool

	mu   sync.Mutex
	seen map[netip.Addr]way
}

// way is how packets to an address leave this node.
type way struct {
	link  int
	local bool
	until time.Time
}

// wayLifetime is how long a route is believed.
const wayLifetime = 5 * time.Second

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
	return &routes{family: f, mark: mark, handle: h, seen: map[netip.Addr]way{}}, nil
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
	everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if r.family == proxier.IPv6 {
		everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	answers = &netlink.Route{
		LinkIndex: link, Dst: ipNet(everything), Table: answersTable,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: r.number(),
	}
	rule = netlink.NewRule()
	rule.Family, rule.Table, rule.Priority = r.number(), answersTable, answersPriority
	rule.Mark, rule.Mask = r.mark, &r.mark
	return own, answers, rule, nil
}

// ensure makes the routes and the rule where they are not there, and has
// restore put them back from now on.
func (r *routes) ensure() error {
	r.keep.Lock()
	defer r.keep.Unlock()
	own, answers, rule, err := r.entries()
	if err != nil {
		return err
	}
	if err := r.handle.RouteReplace(own); err != nil {
		return fmt.Errorf("route %s to this node: %w", own.Dst, err)
	}
	if err := r.handle.RouteReplace(answers); err != nil {
		return fmt.Errorf("route marked packets to this node: %w", err)
	}
	if err := r.handle.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("rule for marked packets: %w", err)
	}
	r.kept = true
	r.lookAtSourceMarks()
	return nil
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

// apart says whether packets from endpoint to client are sure to pass through
// this node's IP layer, so that an answer to the client's address can be taken
// in: the two must be on different links, and neither be this node itself.
func (r *routes) apart(client, endpoint netip.Addr) bool {
	if client == endpoint || r.sourceMarks.Load() {
		return false
	}
	a, aKnown := r.way(client)
	b, bKnown := r.way(endpoint)
	return aKnown && bKnown && !a.local && !b.local && a.link != b.link
}

func (r *routes) way(a netip.Addr) (way, bool) {
	now := time.Now()
	r.mu.Lock()
	w, known := r.seen[a]
	r.mu.Unlock()
	if known && now.Before(w.until) {
		return w, true
	}
	found, err := r.handle.RouteGet(a.AsSlice())
	if err != nil || len(found) == 0 {
		return way{}, false
	}
	w = way{link: found[0].LinkIndex, local: found[0].Type == unix.RTN_LOCAL, until: now.Add(wayLifetime)}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen[a] = w
	return w, true
}

// lookAtSourceMarks finds out whether src_valid_mark is set on any interface of
// the calling thread's network namespace, as wg-quick sets it on all. Only IPv4
// has it.
func (r *routes) lookAtSourceMarks() {
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

// expire forgets routes that are not believed any more.
func (r *routes) expire(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for a, w := range r.seen {
		if !now.Before(w.until) {
			delete(r.seen, a)
		}
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
