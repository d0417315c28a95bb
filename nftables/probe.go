package nftables

import (
	"errors"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// probeTable is a table that never comes to be: the transaction that adds it
// fails.
const probeTable = "signalbox-probe"

// Supported says whether this node's kernel can do all that the mode needs, by
// asking it to. The error is a *proxier.UnsupportedError.
func Supported(f plan.Family) error {
	w, err := dial(nft.FamilyOf(f), probeTable)
	if err != nil {
		return unsupported(f, "the netlink socket of nf_tables", "the kernel needs CONFIG_NF_TABLES (module nf_tables)", err)
	}
	defer w.Close()
	return diagnose(f, func(features ...feature) error { return tryFeatures(w, features...) })
}

// feature is something of the kernel that rules are made of.
type feature struct {
	missing, remedy string
	write           func(w *nft.Table)
}

// tryFeatures has the kernel look at features, in a table of their own.
func tryFeatures(w *nft.Table, features ...feature) error {
	return w.Try(func() {
		for _, f := range features {
			f.write(w)
		}
	})
}

// diagnose tries all at once, and only if that fails one feature after the
// other, to name the one that is missing.
func diagnose(f plan.Family, try func(...feature) error) error {
	whole := feature{write: func(w *nft.Table) {
		rules := rulesetOf(w.IPFamily, proxier.DefaultMasqueradeMark, probeNode)
		st := newState(w.IPFamily)
		for _, large := range []bool{false, true} {
			st.chains[sizedChain{size: 2, timeout: 1e9, large: large}] = 0
		}
		w.AddSets()
		w.AddChains(rules.chains(st))
	}}
	err := try(whole)
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EPERM) {
		return unsupported(f, "the right to change nf_tables", "run as root or with CAP_NET_ADMIN", err)
	}
	for _, feature := range features(nft.FamilyOf(f)) {
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
func features(f *nft.IPFamily) []feature {
	ruleOf := func(h *nft.Hook, statements ...nft.Statement) func(w *nft.Table) {
		return func(w *nft.Table) {
			w.AddChains([]nft.Chain{{Name: "probe", Hook: h, Rules: []nft.Rule{nft.NewRule(statements...)}}})
		}
	}
	set := func(id nft.SetID) func(w *nft.Table) {
		return func(w *nft.Table) { w.AddSet(id) }
	}
	config := func(option string) string { return "the kernel needs " + option + " (as a module or built in)" }
	key := nft.Join(f.Daddr(), nft.L4Proto, nft.DPort)
	return []feature{
		{"nf_tables for " + f.String(), config("CONFIG_NF_TABLES and CONFIG_NF_TABLES_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.AddrLen == 4]), func(*nft.Table) {}},
		{"the filter hook of nf_tables", config("CONFIG_NF_TABLES"), ruleOf(access.FilterForward, nft.Drop())},
		{"NAT in nf_tables", config("CONFIG_NFT_NAT"), func(w *nft.Table) { w.AddChain(nft.Chain{Name: "probe", Hook: access.NATPrerouting}) }},
		{"maps with concatenated keys", config("a release of at least 4.1"), set(frontends)},
		{"sets of concatenated ranges", config("a release of at least 5.6"), set(access.AllowedSources)},
		{"sets of ranges", config("CONFIG_NF_TABLES with nft_set_rbtree"), set(access.ServiceCIDRs)},
		{"maps with time-outs that packets fill", config("CONFIG_NF_TABLES with nft_set_hash"), set(affinity)},
		{"conntrack in rules (ct)", config("CONFIG_NFT_CT"), ruleOf(access.FilterForward, nft.StateNew(), nft.Drop())},
		{"routing look-ups in rules (fib)", config("CONFIG_NFT_FIB_IPV4 and CONFIG_NFT_FIB_IPV6"), ruleOf(access.FilterForward, nft.FibLocal(true), nft.Drop())},
		{"random numbers in rules (numgen)", config("CONFIG_NFT_NUMGEN"), ruleOf(access.NATPrerouting, nft.SetPriorityFrom(nft.Random(2)))},
		{"reject", config("CONFIG_NFT_REJECT and CONFIG_NFT_REJECT_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.AddrLen == 4]), ruleOf(access.FilterForward, f.Reject())},
		{"masquerade", config("CONFIG_NFT_MASQ"), ruleOf(access.NATPostrouting, nft.MasqueradeRandom())},
		{"dnat to an address from a map", config("CONFIG_NFT_NAT"), func(w *nft.Table) {
			set(endpoints)(w)
			ruleOf(access.NATPrerouting, f.DNATTo(lookedUp(nft.Join(nft.PriorityBits(^chainMask, 0), nft.Random(2)), endpoints)))(w)
		}},
		{"setting the priority from a map", config("CONFIG_NF_TABLES"), func(w *nft.Table) {
			set(frontends)(w)
			ruleOf(access.NATPrerouting, nft.SetPriorityFrom(idLookedUp(key, frontends)))(w)
		}},
		{"changing a map from a rule (dynset)", config("a release of at least 5.4"), func(w *nft.Table) {
			set(affinity)(w)
			client := nft.Join(f.Saddr(), nft.PriorityBits(blockMask(false), 0))
			ruleOf(access.NATPrerouting, remember(client, nft.Priority, 1e9), forget(client, nft.Priority))(w)
		}},
	}
}
