// SPDX-License-Identifier: Apache-2.0

package access

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// probeTable never exists: the transaction that adds it fails.
const probeTable = "signalbox-probe"

// Supported asks the kernel to check the sets and chains of a mode and to undo them. The
// error is a *proxier.UnsupportedError that names the missing feature.
func Supported(mode string, f plan.Family, sets []*nft.Set, chains []nft.Chain) error {
	whole := func() error {
		t, err := nft.Open(nft.FamilyOf(f), probeTable, sets)
		if err != nil {
			return err
		}
		defer t.Close()
		return t.Try(func() {
			t.AddSets()
			t.AddChains(chains)
		})
	}
	t, err := nft.Open(nft.FamilyOf(f), probeTable, probeSets())
	if err != nil {
		return unsupported(mode, f, "the netlink socket of nf_tables", "the kernel needs CONFIG_NF_TABLES (module nf_tables)", err)
	}
	defer t.Close()
	return diagnose(mode, f, whole, func(feature feature) error { return t.Try(func() { feature.write(t) }) })
}

// unsupported is the error for a node whose kernel lacks something.
func unsupported(mode string, f plan.Family, missing, remedy string, err error) error {
	return &proxier.UnsupportedError{Mode: mode, Family: f, Missing: missing, Remedy: remedy, Err: err}
}

// feature is something of the kernel that rules use.
type feature struct {
	missing, remedy string
	write           func(t *nft.Table)
}

// diagnose tries everything together. If that fails, it tries the features one by one,
// to name the missing one.
func diagnose(mode string, f plan.Family, whole func() error, try func(feature) error) error {
	err := whole()
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EPERM) {
		return unsupported(mode, f, "the right to change nf_tables", "run as root or with CAP_NET_ADMIN", err)
	}
	for _, feature := range features(nft.FamilyOf(f)) {
		if err := try(feature); err != nil {
			return unsupported(mode, f, feature.missing, feature.remedy, err)
		}
	}
	return unsupported(mode, f, "something that the rules need together", "please report this with the kernel's version", err)
}

// The sets of features, beside those of every mode.
const (
	ids = FirstOwn + iota
	slots
	clients
)

func probeSets() []*nft.Set {
	id := []nft.Field{nft.MarkDatum}
	return append(Sets(),
		&nft.Set{Name: "ids", Key: FrontendKey, Data: id},
		&nft.Set{Name: "slots", Key: []nft.Field{nft.ClassIDField, nft.MarkField}, Data: []nft.Field{nft.AddrField, nft.PortField}},
		&nft.Set{Name: "clients", Key: []nft.Field{nft.AddrField, nft.ClassIDField}, Data: id, Dynamic: true, Size: 1 << 10})
}

// features lists what is tried, the more fundamental first.
func features(f *nft.IPFamily) []feature {
	ruleOf := func(h *nft.Hook, statements ...nft.Statement) func(t *nft.Table) {
		return func(t *nft.Table) {
			t.AddChains([]nft.Chain{{Name: "probe", Hook: h, Rules: []nft.Rule{nft.NewRule(statements...)}}})
		}
	}
	set := func(id nft.SetID) func(t *nft.Table) {
		return func(t *nft.Table) { t.AddSet(id) }
	}
	config := func(option string) string { return "the kernel needs " + option + " (as a module or built in)" }
	key := nft.Join(f.Daddr(), nft.L4Proto, nft.DPort)
	return []feature{
		{"nf_tables for " + f.String(), config("CONFIG_NF_TABLES and CONFIG_NF_TABLES_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.AddrLen == 4]), func(*nft.Table) {}},
		{"the filter hook of nf_tables", config("CONFIG_NF_TABLES"), ruleOf(FilterForward, nft.Drop())},
		{"NAT in nf_tables", config("CONFIG_NFT_NAT"), func(t *nft.Table) { t.AddChain(nft.Chain{Name: "probe", Hook: NATPrerouting}) }},
		{"maps with concatenated keys", config("a release of at least 4.1"), set(ids)},
		{"sets of concatenated ranges", config("a release of at least 5.6"), set(AllowedSources)},
		{"sets of ranges", config("CONFIG_NF_TABLES with nft_set_rbtree"), set(ServiceCIDRs)},
		{"maps with time-outs that packets fill", config("CONFIG_NF_TABLES with nft_set_hash"), set(clients)},
		{"conntrack in rules (ct)", config("CONFIG_NFT_CT"), ruleOf(FilterForward, nft.StateNew(), nft.Drop())},
		{"routing look-ups in rules (fib)", config("CONFIG_NFT_FIB_IPV4 and CONFIG_NFT_FIB_IPV6"), ruleOf(FilterForward, nft.SaddrIsLocal(), nft.Drop())},
		{"random numbers in rules (numgen)", config("CONFIG_NFT_NUMGEN"), ruleOf(NATPrerouting, nft.SetPriorityFrom(nft.Random(2)))},
		{"reject", config("CONFIG_NFT_REJECT and CONFIG_NFT_REJECT_" + map[bool]string{true: "IPV4", false: "IPV6"}[f.AddrLen == 4]), ruleOf(FilterForward, f.Reject())},
		{"masquerade", config("CONFIG_NFT_MASQ"), ruleOf(NATPostrouting, nft.MasqueradeRandom())},
		{"dnat to an address from a map", config("CONFIG_NFT_NAT"), func(t *nft.Table) {
			set(slots)(t)
			ruleOf(NATPrerouting, f.DNATTo(nft.LookedUp(nft.Join(nft.PriorityBits(^uint32(1), 0), nft.Random(2)), "slots")))(t)
		}},
		{"setting the priority from a map", config("CONFIG_NF_TABLES"), func(t *nft.Table) {
			set(ids)(t)
			ruleOf(NATPrerouting, nft.SetPriorityFrom(nft.MarkLookedUp(key, "ids")))(t)
		}},
		{"transparent sockets in rules (socket)", config("CONFIG_NFT_SOCKET"), ruleOf(PreDNATPrerouting, nft.TransparentSocket(), nft.Drop())},
		{"changing a map from a rule (dynset)", config("a release of at least 5.4"), func(t *nft.Table) {
			set(clients)(t)
			client := nft.Join(f.Saddr(), nft.PriorityBits(^uint32(1), 0))
			ruleOf(NATPrerouting, nft.Remember("clients", client, nft.Priority, time.Second), nft.Forget("clients", client, nft.Priority))(t)
		}},
	}
}

// DropTable deletes a table, and says whether it was there.
func DropTable(f plan.Family, name string) (removed bool, err error) {
	t, err := nft.Open(nft.FamilyOf(f), name, nil)
	if errors.Is(err, unix.EPROTONOSUPPORT) { // a kernel without nfnetlink has no tables
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer t.Close()
	if removed, err = drop(t); err != nil {
		return false, fmt.Errorf("delete table %s of %s: %w", name, f, err)
	}
	return removed, nil
}

func drop(t *nft.Table) (removed bool, err error) {
	removed = t.DeleteTable()
	err = Commit(t)
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, without nf_tables
		return false, nil
	}
	return removed && err == nil, err
}

// HasTable says whether the kernel has a table. It writes nothing.
func HasTable(f plan.Family, name string) (bool, error) {
	t, err := nft.Open(nft.FamilyOf(f), name, nil)
	if err != nil {
		return false, err
	}
	defer t.Close()
	return t.Exists()
}
