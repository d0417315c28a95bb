// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// iptables-nft-restore takes twice as long for many chains as this file, which writes the
// same chains into the tools' tables as one transaction of nf_tables.

// netlink writes scripts of one family.
type netlink struct {
	family *nft.IPFamily
	log    *slog.Logger
	// logged says that the log has a reason why the tools write some scripts.
	logged bool
	// transactions are those of Tools.
	transactions *int
}

// commit sends a transaction, and counts it if the kernel took it.
func (n *netlink) commit(b *batch) error {
	err := b.commit()
	if b.last != 0 && err == nil {
		*n.transactions++
	}
	return err
}

// apply writes the chains of a script. done is false if the tools must write them: a rule
// has no netlink form, or the kernel refused one, and the tools say which. An error wraps
// proxier.ErrUnknownState.
func (n *netlink) apply(ctx context.Context, s Script) (done bool, err error) {
	switch err := n.write(s); {
	case err == nil:
		return true, nil
	case !errors.As(err, new(refusedError)):
		return false, fmt.Errorf("write chains of iptables-nft: %w: %w", proxier.ErrUnknownState, err)
	case !n.logged:
		n.logged = true
		n.log.DebugContext(ctx, "the iptables tools write a change that netlink cannot write; further ones are not logged",
			"family", n.family.Family.String(), "error", err)
	}
	return false, nil
}

// write sends one transaction. Unless the error is a refusedError, its outcome is unknown.
func (n *netlink) write(s Script) error {
	b := newBatch(uint8(n.family.Table), expectedSize(s))
	for i := range s {
		if err := n.section(b, &s[i]); err != nil {
			return refusedError{err}
		}
	}
	return n.commit(b)
}

// expectedSize is the number of bytes that most scripts need.
func expectedSize(s Script) (size int) {
	const chain, rule = 160, 400
	for _, section := range s {
		for _, c := range section.Chains {
			size += chain + rule*len(c.Rules)
		}
	}
	return size
}

// addTargets adds the chains to which lines about built-in chains lead. Existing ones keep
// their rules.
func (n *netlink) addTargets(s Script) error {
	b := newBatch(uint8(n.family.Table), 0)
	for _, section := range s {
		for _, line := range section.Builtin {
			b.addChain(section.Table, JumpTarget(line))
		}
	}
	return n.commit(b)
}

// section adds the changes of one table's chains, in the order of eachLine.
func (n *netlink) section(b *batch, s *Section) error {
	for _, c := range s.Chains {
		b.addChain(s.Table, c.Name)
		b.flushChain(s.Table, c.Name)
		for _, rule := range c.Rules {
			if err := b.translate(n.family, s.Table, c.Name, rule); err != nil {
				return fmt.Errorf("%s: %w", rule, err)
			}
		}
	}
	for _, c := range s.Chains {
		if c.Gone {
			b.deleteChain(s.Table, c.Name)
		}
	}
	return nil
}

// UseNetlink makes Apply write chains of the nft variant without the tools, if the tools
// list what netlink writes as they list what they write themselves. rules are examples of
// every form, for each table; they may lead to the chain scratch. That chain and two with
// longer names exist for a moment. After an error the tools go on to write everything.
func (t *Tools) UseNetlink(ctx context.Context, log *slog.Logger, scratch string, rules map[string][]string) error {
	n := &netlink{family: nft.FamilyOf(t.Family), log: log, transactions: &t.transactions}
	restored, written := scratch+"-T", scratch+"-N"
	var byTools, byNetlink, remove Script
	for table, rules := range rules {
		byTools.Add(table, []Chain{{Name: scratch}, {Name: restored, Level: 1, Rules: rules}})
		byNetlink.Add(table, []Chain{{Name: written, Rules: rules}})
		remove.Add(table, []Chain{Removal(scratch), Removal(restored), Removal(written)})
	}
	err := t.restore(ctx, byTools)
	if err == nil {
		err = n.write(byNetlink)
	}
	for table := range rules {
		if err == nil {
			err = t.compareChains(ctx, table, restored, written)
		}
	}
	if n.write(remove) != nil {
		err = errors.Join(err, t.restore(ctx, remove))
	}
	if err == nil {
		t.netlink = n
	}
	return err
}

// compareChains fails if the tools list other rules for a chain than for one that they
// wrote.
func (t *Tools) compareChains(ctx context.Context, table, restored, written string) error {
	want, err := t.ListChain(ctx, table, restored)
	if err != nil {
		return err
	}
	for i := range want {
		want[i] = strings.Replace(want[i], restored, written, 1)
	}
	got, err := t.ListChain(ctx, table, written)
	if err != nil || slices.Equal(got, want) {
		return err
	}
	strange := slices.DeleteFunc(got, func(rule string) bool { return slices.Contains(want, rule) })
	return fmt.Errorf("table %s: rules that netlink wrote have another text in %s: %q", table, t.Command, strange)
}

// ListChain returns a chain's rules as iptables-save prints them. iptables-nft reads only
// this chain; iptables-nft-save reads all chains of all tables, whichever table it prints.
func (t *Tools) ListChain(ctx context.Context, table, chain string) (rules []string, err error) {
	out, err := exec.CommandContext(ctx, t.Command, "-w", strconv.Itoa(int(t.Wait/time.Second)), "-t", table, "-S", chain).Output()
	if err != nil {
		return nil, fmt.Errorf("%s -t %s -S %s: %w", t.Command, table, chain, err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, strings.TrimSuffix(line, "\n"))
		}
	}
	return rules, nil
}

// countNFTRules counts the rules of the nft variant, at most so many. Without nf_tables there
// are none.
func countNFTRules(f plan.Family, atMost int) (n int) {
	for _, table := range nftTables {
		n += countTableRules(nft.FamilyOf(f), table, atMost-n)
	}
	return n
}

func countTableRules(f *nft.IPFamily, table string, atMost int) (n int) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return 0
	}
	defer unix.Close(fd) // ends a dump that goes on
	b := &batch{family: uint8(f.Table)}
	b.request(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, func() { b.text(unix.NFTA_RULE_TABLE, table) })
	if err := unix.Sendto(fd, b.data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0
	}
	for answer := make([]byte, 64<<10); n < atMost; {
		length, _, err := unix.Recvfrom(fd, answer, 0)
		if err != nil {
			return n
		}
		messages, err := syscall.ParseNetlinkMessage(answer[:length])
		if err != nil {
			return n
		}
		for _, m := range messages {
			if m.Header.Type != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE {
				return n // the end, or an error
			}
			n = min(n+1, atMost)
		}
	}
	return n
}
