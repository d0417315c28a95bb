package iptables

import (
	"context"
	"errors"
	"os"
	"time"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// probeChain is made and removed again to learn what the kernel can do.
const probeChain = clusterPrefix + "PROBE"

// features are what rules use: all of them always, except for those of a
// protocol that may be missing without harm to others.
var features = []struct {
	name  string
	table table
	rule  string
}{
	{"the match addrtype (xt_addrtype)", nat, fromNode + " -j RETURN"},
	{"the match comment (xt_comment)", nat, comment("probe") + " -j RETURN"},
	{"the match mark (xt_mark)", nat, " -m mark --mark 0x4000/0x4000 -j RETURN"},
	{"the match statistic (xt_statistic)", nat, " -m statistic --mode random --probability 0.5 -j RETURN"},
	{"the match recent (xt_recent)", nat, " -m recent --name " + probeChain + " --rcheck --seconds 1 --reap --rsource -j RETURN"},
	{"the target MARK (xt_mark)", nat, " -j MARK --or-mark 0x4000"},
	{"the target DNAT (xt_nat)", nat, ""},
	{"the target MASQUERADE (xt_MASQUERADE)", nat, " -j MASQUERADE"},
	{"the match conntrack (xt_conntrack)", filter, " -m conntrack --ctstate NEW -j RETURN"},
	{"the target REJECT (ipt_REJECT, ip6t_REJECT)", filter, " -j REJECT"},
}

// Supported says whether this node can run the mode in one family: a
// *proxier.UnsupportedError names what is missing. It makes an unused chain
// for a moment where the kernel has to be asked; where an earlier process has
// its rules, they are the answer.
func Supported(f plan.Family) error {
	if f == plan.IPv6 {
		if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
			return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "IPv6 in the kernel", Remedy: "start the kernel without ipv6.disable=1", Err: err}
		}
	}
	t, _, err := pickTools(f, Tuning{LockWait: defaultWait})
	if err != nil {
		return err
	}
	if signed, err := t.signed(context.Background()); err == nil && signed {
		return nil
	}
	return t.probe()
}

func (t *tools) probe() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*t.wait+30*time.Second)
	defer cancel()
	var chains [tableCount][]string
	for i := range features {
		table, rule := t.feature(i)
		chains[table] = append(chains[table], rule)
	}
	whole := t.tryRules(ctx, chains)
	if whole == nil {
		return nil
	}
	for i, feature := range features {
		var one [tableCount][]string
		table, rule := t.feature(i)
		one[table] = []string{rule}
		if err := t.tryRules(ctx, one); err != nil {
			return t.unsupported(ctx, feature.name, table, err)
		}
	}
	return &proxier.UnsupportedError{Mode: Mode, Family: t.family, Missing: "a working " + t.restore, Err: whole}
}

func (t *tools) feature(i int) (table, string) {
	if features[i].rule != "" {
		return features[i].table, features[i].rule
	}
	to := "192.0.2.1:1"
	if t.family == plan.IPv6 {
		to = "[2001:db8::1]:1"
	}
	return features[i].table, " -p tcp -j DNAT --to-destination " + to
}

// unsupported blames the table where not even an empty chain can be made.
func (t *tools) unsupported(ctx context.Context, feature string, in table, err error) error {
	if errors.Is(err, errNotPermitted) {
		return &proxier.UnsupportedError{
			Mode: Mode, Family: t.family, Missing: "the capability CAP_NET_ADMIN", Remedy: "run as root or give it to the container", Err: err,
		}
	}
	var empty [tableCount][]string
	empty[in] = []string{" -j RETURN"}
	if tableErr := t.tryRules(ctx, empty); tableErr != nil {
		feature, err = "the table "+in.String()+" of the "+string(t.backend)+" variant", tableErr
	}
	return &proxier.UnsupportedError{
		Mode: Mode, Family: t.family, Missing: feature,
		Remedy: "load the module or choose another mode", Err: err,
	}
}

// tryRules lets the kernel check rules in a chain that nothing jumps to.
func (t *tools) tryRules(ctx context.Context, rules [tableCount][]string) error {
	var try, remove script
	for table := range tableCount {
		if len(rules[table]) > 0 {
			try.table(table, []edit{chain{probeChain, frameLevel, rules[table]}.edit("")})
			remove.table(table, []edit{removal(probeChain)})
		}
	}
	err := t.apply(ctx, &try)
	if removeErr := t.apply(ctx, &remove); err == nil {
		err = removeErr
	}
	return err
}
