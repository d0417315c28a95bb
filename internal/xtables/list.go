// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Size is a number of chains and of the rules in them.
type Size struct{ Chains, Rules int }

// Listing is what iptables-save says of one table.
type Listing struct {
	Chains []string // without the built-in ones
	// Builtin are the rules of built-in chains, as iptables-save writes them.
	Builtin []string
	Rules   int // of all chains
	// used are the chains that rules in chains of other software jump to.
	used map[string]bool
	// Own is the size of the caller's own chains, and OwnRules are the rules in each of them,
	// as iptables-save writes them after the chain's name.
	Own      Size
	OwnRules map[string][]string
	// Marked says that the table has a marker rule.
	Marked bool
}

// List reads one table. own names the caller's chains, and markers are rules
// to look for. A table that does not exist is empty; the legacy tool then
// creates it.
func (t *Tools) List(ctx context.Context, table string, own func(chain string) bool, markers ...string) (*Listing, error) {
	cmd := exec.CommandContext(ctx, t.Save, "-t", table)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("read table %s: %w", table, err)
	}
	l, scanErr := parse(bufio.NewScanner(out), own, markers)
	if err := errors.Join(cmd.Wait(), scanErr); err != nil {
		return nil, fmt.Errorf("read table %s: %s: %w", table, strings.TrimSpace(stderr.String()), err)
	}
	return l, nil
}

// maxChainLists is how many chains are listed one by one. Each starts a program.
const maxChainLists = 60

// ListOf is List with OwnRules of some chains. In the nft variant it reads only these, if
// they are few. The Listing then has the rules of the built-in chains that have jumps, and
// which of the chains and of the jumps' targets exist.
func (t *Tools) ListOf(ctx context.Context, table string, chains []string, jumps map[string][]string) (*Listing, error) {
	if t.Backend != NFT || len(chains) > maxChainLists {
		return t.List(ctx, table, func(name string) bool { return slices.Contains(chains, name) })
	}
	l := &Listing{OwnRules: map[string][]string{}}
	exists := func(name string) bool { return HasNFTChain(t.Family, table, name) }
	for builtin, targets := range jumps {
		if !exists(builtin) {
			continue
		}
		lines, err := t.ListChain(ctx, table, builtin)
		if err != nil {
			return nil, err
		}
		l.Builtin = append(l.Builtin, lines...)
		l.Chains = append(l.Chains, slices.DeleteFunc(targets, func(name string) bool { return !exists(name) })...)
	}
	for _, name := range slices.DeleteFunc(chains, func(name string) bool { return !exists(name) }) {
		lines, err := t.ListChain(ctx, table, name)
		if err != nil {
			return nil, err
		}
		l.Chains, l.OwnRules[name] = append(l.Chains, name), nil
		for _, line := range lines {
			l.OwnRules[name] = append(l.OwnRules[name], strings.TrimPrefix(line, "-A "+name+" "))
		}
	}
	return l, nil
}

func parse(lines *bufio.Scanner, own func(chain string) bool, markers []string) (*Listing, error) {
	l := &Listing{used: map[string]bool{}, OwnRules: map[string][]string{}}
	builtin := map[string]bool{}
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if rest, ok := strings.CutPrefix(line, ":"); ok {
			name, policy, _ := strings.Cut(rest, " ")
			if !strings.HasPrefix(policy, "-") {
				builtin[name] = true
				continue
			}
			l.Chains = append(l.Chains, name)
			if own != nil && own(name) {
				l.OwnRules[name] = nil
				l.Own.Chains++
			}
		}
		rest, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		l.Rules++
		l.Marked = l.Marked || slices.Contains(markers, line)
		name, rule, _ := strings.Cut(rest, " ")
		rules, owned := l.OwnRules[name]
		switch {
		case builtin[name]:
			l.Builtin = append(l.Builtin, line)
		case owned:
			l.Own.Rules++
			l.OwnRules[name] = append(rules, rule)
		default:
			l.used[JumpTarget(rule)] = true
		}
	}
	return l, lines.Err()
}

// Used are the chains that cannot be removed: rules in other software's chains
// jump to them, or rules in built-in chains that are not removed too.
func (l *Listing) Used(removed func(rule string) bool) map[string]bool {
	used := maps.Clone(l.used)
	for _, rule := range l.Builtin {
		if removed == nil || !removed(rule) {
			used[JumpTarget(rule)] = true
		}
	}
	return used
}

// JumpTarget is the target of a rule as iptables-save writes it, or "".
func JumpTarget(rule string) string {
	words := strings.Fields(rule)
	for i := len(words) - 2; i >= 0; i-- {
		if words[i] == "-j" || words[i] == "-g" {
			return words[i+1]
		}
	}
	return ""
}
