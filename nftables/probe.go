package nftables

import (
	"errors"

	"golang.org/x/sys/unix"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// probeTable is a table that never comes to be: the transaction that adds it
// fails.
const probeTable = "signalbox-probe"

// Supported says whether this node's kernel can do all that the mode needs, by
// asking it to. The error is a *proxier.UnsupportedError.
func Supported(f plan.Family) error {
	w, err := dial(familyOf(f), probeTable)
	if err != nil {
		return unsupported(f, "the netlink socket of nf_tables", "the kernel needs CONFIG_NF_TABLES (module nf_tables)", err)
	}
	defer w.close()
	return diagnose(f, func(features ...feature) error { return tryFeatures(w, features...) })
}

// feature is something of the kernel that rules are made of.
type feature struct {
	missing, remedy string
	write           func(w *wire)
}

// tryFeatures writes features into a table of their own, in a transaction that
// the kernel looks at and undoes, because at its end it asks for a new table
// where there is one by then. So a start writes nothing, and other software that
// watches the rules is not woken.
func tryFeatures(w *wire, features ...feature) error {
	w.conn.AddTable(w.table)
	for _, f := range features {
		f.write(w)
	}
	w.conn.CreateTable(w.table)
	err := w.flush()
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err == nil {
		err = errors.New("the kernel made two tables of one name")
	}
	return err
}

// diagnose tries all at once, and only if that fails one feature after the
// other, to name the one that is missing.
func diagnose(f plan.Family, try func(...feature) error) error {
	whole := feature{write: func(w *wire) {
		rules := ruleset{w.family, proxier.DefaultMasqueradeMark, probeNode}
		st := newState(w.family)
		for _, large := range []bool{false, true} {
			st.chains[sizedChain{size: 2, timeout: 1e9, large: large}] = 0
		}
		w.addSets()
		w.addChains(rules.chains(st))
	}}
	err := try(whole)
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EPERM) {
		return unsupported(f, "the right to change nf_tables", "run as root or with CAP_NET_ADMIN", err)
	}
	for _, feature := range features(familyOf(f)) {
		if err := try(feature); err != nil {
			return unsupported(f, feature.missing, feature.remedy, err)
		}
	}
	return unsupported(f, "something that the rules need together", "please report this with the kernel's version", err)
}

// probeNode makes rules of every shape.
var probeNode = plan.Node{
	LocalPods:     plan.LocalPods{Interface: "probe0", InterfacePrefix: "probe"},
	NodePortAddrs: plan.NodePortAddrs{All: true},
}

func unsupported(f plan.Family, missing, remedy string, err error) error {
	return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: missing, Remedy: remedy, Err: err}
}

// features lists what is tried, the more fundamental first.
func features(f *family) []feature {
	ruleOf := func(h *hook, statements ...statement) func(w *wire) {
		return func(w *wire) { w.addChains([]chain{{name: "probe", hook: h, rules: []rule{newRule(statements...)}}}) }
	}
	set := func(id setID) func(w *wire) {
		return func(w *wire) { w.check(w.conn.AddSet(w.sets[id], nil), w.sets[id]) }
	}
	config := func(option string) string { return "the kernel needs " + option + " (as a module or built in)" }
	key := join(f.daddr(), l4proto, dport)
	return []feature{
		{"nf_tables for " + f.String(), config("CONFIG_NF_TABLES and CONFIG_NF_TABLES_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.addrLen == 4]), func(*wire) {}},
		{"the filter hook of nf_tables", config("CONFIG_NF_TABLES"), ruleOf(filterForward, drop())},
		{"NAT in nf_tables", config("CONFIG_NFT_NAT"), func(w *wire) { w.addChain(chain{name: "probe", hook: natPrerouting}) }},
		{"maps with concatenated keys", config("a release of at least 4.1"), set(frontends)},
		{"sets of concatenated ranges", config("a release of at least 5.6"), set(allowedSources)},
		{"sets of ranges", config("CONFIG_NF_TABLES with nft_set_rbtree"), set(serviceCIDRs)},
		{"maps with time-outs that packets fill", config("CONFIG_NF_TABLES with nft_set_hash"), set(affinity)},
		{"conntrack in rules (ct)", config("CONFIG_NFT_CT"), ruleOf(filterForward, stateNew(), drop())},
		{"routing look-ups in rules (fib)", config("CONFIG_NFT_FIB_IPV4 and CONFIG_NFT_FIB_IPV6"), ruleOf(filterForward, fibLocal(true), drop())},
		{"random numbers in rules (numgen)", config("CONFIG_NFT_NUMGEN"), ruleOf(natPrerouting, setPriority(random(2)))},
		{"reject", config("CONFIG_NFT_REJECT and CONFIG_NFT_REJECT_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.addrLen == 4]), ruleOf(filterForward, f.reject())},
		{"masquerade", config("CONFIG_NFT_MASQ"), ruleOf(natPostrouting, masqueradeRandom())},
		{"dnat to an address from a map", config("CONFIG_NFT_NAT"), func(w *wire) {
			set(endpoints)(w)
			ruleOf(natPrerouting, f.dnatTo(lookedUp(join(priorityBits(^chainMask, 0), random(2)), endpoints)))(w)
		}},
		{"setting the priority from a map", config("CONFIG_NF_TABLES"), func(w *wire) {
			set(frontends)(w)
			ruleOf(natPrerouting, setPriority(idLookedUp(key, frontends)))(w)
		}},
		{"changing a map from a rule (dynset)", config("a release of at least 5.4"), func(w *wire) {
			set(affinity)(w)
			client := join(f.saddr(), priorityBits(blockMask(false), 0))
			ruleOf(natPrerouting, remember(client, priority, 1e9), forget(client, priority))(w)
		}},
	}
}
