// SPDX-License-Identifier: Apache-2.0

package xtables

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"signalbox/proxier"
)

// Chain is one chain that a script writes, or removes if it is Gone.
type Chain struct {
	Name string
	// Rules are the texts after "-A CHAIN", with the blank that follows it.
	Rules []string
	// Owners are the Service ports that errors about rules name, "" for none. The
	// last one owns all further rules too.
	Owners []string
	// Level orders chains: rules jump only to chains of lower levels.
	Level uint8
	Gone  bool
}

// goneLevel is above all others.
const goneLevel = 255

// Removal removes a chain.
func Removal(name string) Chain { return Chain{Name: name, Level: goneLevel, Gone: true} }

func (c *Chain) ownerOf(rule int) string {
	if len(c.Owners) == 0 {
		return ""
	}
	return c.Owners[min(rule, len(c.Owners)-1)]
}

// Script is input of iptables-restore.
type Script []Section

// Section is the part of a script that changes one table. The kernel takes it
// all at once or not at all.
type Section struct {
	Table  string
	Chains []Chain
	// Builtin are whole lines about rules of built-in chains.
	Builtin []string
}

// Add adds a section; nothing without chains and lines. Naming a chain empties
// it, or makes it, so that a removal never fails because there is no chain.
//
// Chains come before those that jump to them, each with its rules at once, and
// those of one level in falling order of their names. The nft variant walks
// the sorted list of all chains named so far, up to the one it looks for, at
// every line: in this order it finds nearly every one at the start. In the
// order in which Services come, ten thousand of them take four times as long.
func (s *Script) Add(table string, chains []Chain, builtin ...string) {
	if len(chains)+len(builtin) == 0 {
		return
	}
	slices.SortFunc(chains, func(a, b Chain) int {
		return cmp.Or(cmp.Compare(a.Level, b.Level), cmp.Compare(b.Name, a.Name))
	})
	*s = append(*s, Section{table, chains, builtin})
}

// Rules is the number of rules that the script writes to a table.
func (s Script) Rules(table string) (n int) {
	for _, section := range s {
		if section.Table == table {
			n += len(section.Builtin)
			for _, c := range section.Chains {
				n += len(c.Rules)
			}
		}
	}
	return n
}

const commit = "COMMIT"

// eachLine visits every line, in parts, with its owner.
func (s Script) eachLine(visit func(owner string, parts [3]string)) {
	for _, section := range s {
		visit("", [3]string{"*", section.Table})
		for i := range section.Chains {
			c := &section.Chains[i]
			visit("", [3]string{":", c.Name, " - [0:0]"})
			for n, rule := range c.Rules {
				visit(c.ownerOf(n), [3]string{"-A ", c.Name, rule})
			}
		}
		for _, line := range section.Builtin {
			visit("", [3]string{line})
		}
		for _, c := range section.Chains {
			if c.Gone {
				visit("", [3]string{"-X ", c.Name})
			}
		}
		visit("", [3]string{commit})
	}
}

func (s Script) write(w *bytes.Buffer) {
	s.eachLine(func(_ string, parts [3]string) {
		for _, p := range parts {
			w.WriteString(p)
		}
		w.WriteByte('\n')
	})
}

func (s Script) String() string {
	var text bytes.Buffer
	s.write(&text)
	return text.String()
}

// exitLocked is the exit status with which the legacy tools give up waiting
// for the lock.
const exitLocked = 4

// lineOfError finds the input line in the various ways in which the tools name
// it: "line 7 failed", "line 7: RULE_APPEND failed", "Error occurred at line: 7".
var lineOfError = regexp.MustCompile(`\bline:? (\d+)\b`)

// ErrNotPermitted is about the process, not about any rule.
var ErrNotPermitted = errors.New("this process may not change rules")

// ErrNoLock is about the file of the legacy tools' lock.
var ErrNoLock = errors.New("the lock of iptables cannot be opened")

// Apply makes the kernel take the script. An error wraps
// proxier.ErrUnknownState if a table may have taken effect.
func (t *Tools) Apply(ctx context.Context, s Script) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.netlink == nil {
		return t.restore(ctx, s)
	}
	// First jumps to chains without rules, then all rules at once.
	chains, builtin := s.split()
	if t.netlink.addTargets(builtin) != nil {
		return t.restore(ctx, s)
	}
	if err := t.restore(ctx, builtin); err != nil {
		return err
	}
	if done, err := t.netlink.apply(ctx, chains); done || err != nil {
		return err
	}
	return t.restore(ctx, chains)
}

// split separates chains from lines about built-in chains.
func (s Script) split() (chains, builtin Script) {
	for _, section := range s {
		if len(section.Chains) > 0 {
			chains = append(chains, Section{Table: section.Table, Chains: section.Chains})
		}
		if len(section.Builtin) > 0 {
			builtin = append(builtin, Section{Table: section.Table, Builtin: section.Builtin})
		}
	}
	return chains, builtin
}

// restore gives the script to iptables-restore.
func (t *Tools) restore(ctx context.Context, s Script) error {
	if len(s) == 0 {
		return nil
	}
	// --counters keeps the counters of chains that are not named.
	cmd := exec.CommandContext(ctx, t.Restore, "--noflush", "--counters", "-w", strconv.Itoa(int(t.Wait/time.Second)))
	var input, output bytes.Buffer
	s.write(&input)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &input, &output, &output
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		t.Wrote(len(s))
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s was stopped: %w: %w", t.Restore, context.Cause(ctx), proxier.ErrUnknownState)
	}
	message := strings.TrimSpace(output.String())
	line := 0
	if m := lineOfError.FindStringSubmatch(message); m != nil {
		line, _ = strconv.Atoi(m[1])
	}
	refused, committed := s.describe(line)
	var exit *exec.ExitError
	locked := errors.As(err, &exit) && exit.ExitCode() == exitLocked && strings.Contains(message, "lock")
	if message != "" {
		err = fmt.Errorf("%s; %w", strings.ReplaceAll(message, "\n", "; "), err)
	}
	err = fmt.Errorf("%s %s: %w", t.Restore, refused, err)
	switch {
	case strings.Contains(message, "Permission denied"):
		err = fmt.Errorf("%w: %w", ErrNotPermitted, err)
	case strings.Contains(message, "can't open lock file"):
		err = fmt.Errorf("%w: %w", ErrNoLock, err)
	case locked:
		err = fmt.Errorf("another program has held the lock of iptables (%s) for %s: %w", lockFile(), t.Wait, err)
	}
	if committed {
		err = fmt.Errorf("%w: %w", err, proxier.ErrUnknownState)
	}
	return err
}

// describe says what iptables-restore refused, given the line that it named or
// 0, and whether it may have committed a table before.
func (s Script) describe(line int) (refused string, committed bool) {
	refused = "failed"
	if line == 0 {
		return refused, len(s) > 1
	}
	n := 0
	s.eachLine(func(owner string, parts [3]string) {
		n++
		if n < line {
			committed = committed || parts[0] == commit
		} else if n == line {
			refused = fmt.Sprintf("refused line %d (%s)", line, strings.Join(parts[:], ""))
			if owner != "" {
				refused += " of Service port " + owner
			}
		}
	})
	return refused, committed
}

func lockFile() string {
	if path := os.Getenv("XTABLES_LOCKFILE"); path != "" {
		return path
	}
	return "/run/xtables.lock"
}
