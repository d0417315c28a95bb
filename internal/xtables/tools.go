// SPDX-License-Identifier: Apache-2.0

// Package xtables finds the iptables tools. It lists, writes and compares chains, and
// notices writes of other software. It decides nothing about Services.
package xtables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"

	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// mode is the mode that needs the tools.
const mode = "iptables"

// Backend is the variant of the iptables tools.
type Backend string

// The two variants. They do not see each other's rules, and a packet passes
// both.
const (
	Legacy Backend = "legacy"
	NFT    Backend = "nft"
)

// Backends are both.
var Backends = []Backend{NFT, Legacy}

// lockWait bounds the wait for the lock.
const lockWait = 5 * time.Second

// Tools are the programs of one variant for one family. They work in the
// network namespace of the calling thread.
type Tools struct {
	Backend                Backend
	Family                 plan.Family
	Command, Restore, Save string        // paths
	Wait                   time.Duration // for the lock, in whole seconds
	version                [3]int
	netlink                *netlink // nil: the programs write everything
	// transactions are those of the nft variant since the current Unobserved began. One with
	// an unknown outcome does not count: it must not hide a change by other software.
	transactions int
}

// Wrote counts transactions that a caller made with the programs in Unobserved.
func (t *Tools) Wrote(transactions int) { t.transactions += transactions }

// oldestVersion is the first whose iptables-restore waits for the lock, and
// which knows --random-fully.
var oldestVersion = [3]int{1, 6, 2}

// CommandName is the name of the family's program.
func CommandName(f plan.Family) string {
	if f == plan.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// Missing is the error for a node without the family's tools. The reasons say
// why those that are there do not work.
func Missing(f plan.Family, reasons ...string) *proxier.UnsupportedError {
	missing := &proxier.UnsupportedError{
		Mode: mode, Family: f, Missing: "program " + CommandName(f),
		Remedy: "install the package iptables, or use the image signalbox-iptables",
	}
	if len(reasons) > 0 {
		missing.Err = errors.New(strings.Join(slices.Compact(reasons), "; "))
	}
	return missing
}

// Find returns the programs of a variant.
func Find(f plan.Family, b Backend) (*Tools, error) {
	t, reasons := find(f, b)
	if t == nil {
		missing := Missing(f, reasons...)
		missing.Missing += "-" + string(b)
		return nil, missing
	}
	return t, nil
}

// find looks for the programs that are named after the variant or, if a system
// has only one variant, for programs with the plain names. Programs that do not
// exist are no reason.
func find(f plan.Family, b Backend) (found *Tools, reasons []string) {
	base := CommandName(f)
	for _, name := range []string{base + "-" + string(b), base} {
		t := &Tools{Family: f, Wait: lockWait}
		err := t.locate(name)
		switch {
		case err == nil && t.Backend == b:
			return t, nil
		case err == nil:
			reasons = append(reasons, fmt.Sprintf("%s is the %s variant", t.Command, t.Backend))
		case !errors.Is(err, exec.ErrNotFound):
			reasons = append(reasons, err.Error())
		}
	}
	return nil, reasons
}

var versionOutput = regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)`)

// locate finds the three programs, and asks the first for its variant and version.
func (t *Tools) locate(name string) (err error) {
	for path, program := range map[*string]string{&t.Command: name, &t.Restore: name + "-restore", &t.Save: name + "-save"} {
		if *path, err = lookPath(program); err != nil {
			return err
		}
	}
	out, err := exec.Command(t.Command, "--version").Output()
	if err != nil {
		return fmt.Errorf("%s --version: %w", t.Command, err)
	}
	m := versionOutput.FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("%s --version says %q, which holds no version", t.Command, out)
	}
	for i := range t.version {
		t.version[i], _ = strconv.Atoi(string(m[1+i]))
	}
	t.Backend = Legacy
	if strings.Contains(string(out), "nf_tables") {
		t.Backend = NFT
	}
	return nil
}

// lookPath also looks where a PATH for ordinary users does not.
func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, lookErr := exec.LookPath(filepath.Join(dir, program)); lookErr == nil {
			return path, nil
		}
	}
	return "", err
}

// Choose returns the variant that is asked for or, without one, the variant
// that the node uses; why is the reason for the log.
func Choose(ctx context.Context, f plan.Family, asked Backend) (t *Tools, why string, err error) {
	if asked != "" {
		t, err = Find(f, asked)
		why = "asked for"
	} else {
		t, why, err = choose(ctx, f)
	}
	if err == nil && slices.Compare(t.version[:], oldestVersion[:]) < 0 {
		err = &proxier.UnsupportedError{
			Mode: mode, Family: f, Missing: CommandName(f) + " " + versionString(oldestVersion) + " or newer",
			Remedy: "update the package iptables", Err: fmt.Errorf("%s is version %s", t.Command, versionString(t.version)),
		}
	}
	return t, why, err
}

func versionString(v [3]int) string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// choose takes the variant that the kubelet of this node uses. Without the
// kubelet's hint it takes the one with more rules, because the rules of other
// software must be seen; without any rules, the system's default.
func choose(ctx context.Context, f plan.Family) (t *Tools, why string, err error) {
	nft, nftReasons := find(f, NFT)
	legacy, legacyReasons := find(f, Legacy)
	switch {
	case nft == nil && legacy == nil:
		return nil, "", Missing(f, append(nftReasons, legacyReasons...)...)
	case nft == nil:
		return legacy, "the only variant installed", nil
	case legacy == nil:
		return nft, "the only variant installed", nil
	}
	both := []*Tools{nft, legacy}
	for _, hint := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		for _, t := range both {
			if t.HasChain(ctx, "mangle", hint) {
				return t, "the kubelet's chain " + hint, nil
			}
		}
	}
	l := legacy.countRules(ctx)
	switch n := countNFTRules(f, l+1); {
	case n > l:
		return nft, fmt.Sprintf("%d rules or more there, %d in the other", n, l), nil
	case l > n:
		return legacy, fmt.Sprintf("%d rules there, %d in the other", l, n), nil
	}
	system := Tools{Family: f}
	if err := system.locate(CommandName(f)); err == nil {
		i := slices.IndexFunc(both, func(t *Tools) bool { return t.Backend == system.Backend })
		return both[i], "the system's default", nil
	}
	return nft, "nothing speaks for the other", nil
}

// Client handles single rules and chains.
func (t *Tools) Client() (*iptables.IPTables, error) {
	protocol := iptables.ProtocolIPv4
	if t.Family == plan.IPv6 {
		protocol = iptables.ProtocolIPv6
	}
	client, err := iptables.New(iptables.IPFamily(protocol), iptables.Path(t.Command), iptables.Timeout(int(t.Wait/time.Second)))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.Command, err)
	}
	return client, nil
}

// nftTables are the tables of the nft variant. The tools make the missing ones.
var nftTables = []string{"mangle", "nat", "filter"}

// Tables are the tables that exist. To ask the legacy tools for another would
// create it, and load its module.
func (t *Tools) Tables() []string {
	if t.Backend == NFT {
		return nftTables
	}
	return LegacyTables(t.Family)
}

// HasNFTChain asks nf_tables itself whether a table of the nft variant has the
// chain. It needs no tools.
func HasNFTChain(f plan.Family, table, chain string) bool {
	conn, err := nftables.New()
	if err != nil {
		return false
	}
	_, err = conn.ListChain(&nftables.Table{Name: table, Family: nft.FamilyOf(f).Table}, chain)
	return err == nil
}

// MayHaveChain asks the kernel, and starts no program. If it is false, the variant's table
// does not have the chain. Of the legacy variant it can be true without the chain.
func MayHaveChain(f plan.Family, b Backend, table, chain string) bool {
	if b == NFT {
		return HasNFTChain(f, table, chain)
	}
	return mayHaveLegacyChain(f, table, chain)
}

// HasChain says whether an existing table has the chain.
func (t *Tools) HasChain(ctx context.Context, table, name string) bool {
	found := MayHaveChain(t.Family, t.Backend, table, name)
	if !found || t.Backend == NFT {
		return found
	}
	l, err := t.List(ctx, table, nil)
	return err == nil && slices.Contains(l.Chains, name)
}

func (t *Tools) countRules(ctx context.Context) int {
	n := 0
	for _, name := range t.Tables() {
		if l, err := t.List(ctx, name, nil); err == nil {
			n += l.Rules
		}
	}
	return n
}
