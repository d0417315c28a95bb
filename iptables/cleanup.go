package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/coreos/go-iptables/iptables"

	"signalbox/proxier"
)

// Cleanup removes from both variants what this mode, or kube-proxy in its
// iptables mode, wrote: the jumps and the chains they lead to. A chain that
// rules of other software use keeps its name; KUBE-MARK-MASQ and
// KUBE-POSTROUTING then keep their rules too, without which those rules would
// change their meaning. KUBE-FIREWALL, which the kubelet shares, stays as it
// is, and so does the sysctl route_localnet.
func Cleanup(f proxier.Family) error {
	var failed []error
	found := false
	for _, b := range []Backend{NFT, Legacy} {
		t, err := findTools(f, b, defaultWait)
		if err != nil {
			continue
		}
		found = true
		if err := t.cleanup(context.Background()); err != nil {
			failed = append(failed, fmt.Errorf("clean up %s iptables, %s: %w", b, f, err))
		}
	}
	if !found {
		return &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "program " + commandName(f), Remedy: "install the package iptables"}
	}
	return errors.Join(failed...)
}

func (t *tools) cleanup(ctx context.Context) error {
	client, err := t.client()
	if err != nil {
		return err
	}
	exist := t.tables()
	w := &script{}
	for in := range tableCount {
		if !slices.Contains(exist, in.String()) {
			continue
		}
		l, err := t.list(ctx, in.String())
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(l.chains, isOurs) {
			continue
		}
		if err := removeJumps(client, in); err != nil {
			return err
		}
		// What still leads to a chain now is not ours.
		if l, err = t.list(ctx, in.String()); err != nil {
			return err
		}
		w.table(in, l.removals(in))
	}
	return t.apply(ctx, w)
}

func removeJumps(client *iptables.IPTables, in table) error {
	for _, j := range jumps {
		if j.table != in {
			continue
		}
		// Twice, where an accident put it in twice.
		for exists := true; exists; {
			err := client.Delete(in.String(), j.from, j.args()...)
			if err != nil && !isNoChain(err) {
				return fmt.Errorf("jump from %s %s to %s: %w", in, j.from, j.target, err)
			}
			exists = err == nil
		}
	}
	return nil
}

// removals are the edits that leave none of this mode's chains in the table,
// except for those that others use.
func (l *listing) removals(in table) []edit {
	var edits []edit
	for _, name := range l.chains {
		switch {
		case !isServiceChain(name) && !slices.Contains(fixedChains[in], name):
		case !l.referenced[name]:
			edits = append(edits, removal(name))
		case name != markMasqChain && name != postroutingChain:
			edits = append(edits, edit{name: name})
		}
	}
	return edits
}
