package iptables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"signalbox/proxier"
)

// exitLocked is the exit status with which the legacy tools give up waiting
// for the lock.
const exitLocked = 4

// lineOfError finds the input line in the various ways in which the tools name
// it: "line 7 failed", "line 7: RULE_APPEND failed", "Error occurred at line: 7".
var lineOfError = regexp.MustCompile(`\bline:? (\d+)\b`)

// restoreError says what iptables-restore refused.
type restoreError struct {
	line  int    // 0 where it does not say
	owner string // the Service that the line is about, or ""
	text  string // the line
	msg   string // what it wrote
	err   error
}

func (e *restoreError) Error() string {
	s := "iptables-restore"
	if e.line > 0 {
		s += fmt.Sprintf(" refused line %d (%s)", e.line, e.text)
	} else {
		s += " failed"
	}
	if e.owner != "" {
		s += " of Service port " + e.owner
	}
	return s + ": " + strings.Join(append(strings.FieldsFunc(e.msg, func(r rune) bool { return r == '\n' }), e.err.Error()), "; ")
}

func (e *restoreError) Unwrap() error { return e.err }

// errNotPermitted is about the process, not about any rule.
var errNotPermitted = errors.New("this process may not change rules")

// apply makes the kernel take the script. An error wraps
// proxier.ErrUnknownState where a table may have taken effect.
func (t *tools) apply(ctx context.Context, s *script) error {
	if err := ctx.Err(); err != nil || len(s.commits) == 0 {
		return err
	}
	// --counters leaves the counters of chains that are not named alone.
	cmd := exec.CommandContext(ctx, t.restore, "--noflush", "--counters", "-w", t.waitSeconds())
	cmd.Stdin = bytes.NewReader(s.Bytes())
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("iptables-restore was stopped: %w: %w", context.Cause(ctx), proxier.ErrUnknownState)
	}
	e := &restoreError{msg: strings.TrimSpace(output.String()), err: err}
	if m := lineOfError.FindStringSubmatch(e.msg); m != nil {
		e.line, _ = strconv.Atoi(m[1])
		e.owner, e.text = s.owner(e.line), s.text(e.line)
	}
	err = error(e)
	var exit *exec.ExitError
	switch {
	case strings.Contains(e.msg, "Permission denied"):
		err = fmt.Errorf("%w: %w", errNotPermitted, e)
	case errors.As(e.err, &exit) && exit.ExitCode() == exitLocked && strings.Contains(e.msg, "lock"):
		err = fmt.Errorf("another program has held the lock of iptables (%s) for %s: %w", t.lockFile(), t.wait, e)
	}
	if len(s.commits) > 1 && (e.line == 0 || s.committedBefore(e.line)) {
		err = fmt.Errorf("%w: %w", err, proxier.ErrUnknownState)
	}
	return err
}

// text is one line of the script.
func (s *script) text(line int) string {
	lines := bufio.NewScanner(bytes.NewReader(s.Bytes()))
	for n := 1; lines.Scan(); n++ {
		if n == line {
			return lines.Text()
		}
	}
	return ""
}

// listing is what iptables-save tells of one table.
type listing struct {
	chains []string
	// builtin are the rules of built-in chains, as iptables-save writes them.
	builtin []string
	// referenced are the chains that rules in other software's chains jump to:
	// they cannot be removed.
	referenced map[string]bool
	rules      int
	// own is how much there is of this mode's.
	own extent
	// signed says that this mode wrote the table's rules. See signatures.
	signed bool
}

// list reads one table. A table that does not exist is empty; the legacy tool
// then makes it.
func (t *tools) list(ctx context.Context, name string) (*listing, error) {
	return t.listFor(ctx, name, isOurs)
}

// listFor reads one table for whoever owns the chains that mine names.
func (t *tools) listFor(ctx context.Context, name string, mine func(chain string) bool) (*listing, error) {
	cmd := exec.CommandContext(ctx, t.save, "-t", name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("read table %s: %w", name, err)
	}
	l, scanErr := parseListing(bufio.NewScanner(out), mine)
	if err := errors.Join(cmd.Wait(), scanErr); err != nil {
		return nil, fmt.Errorf("read table %s: %s: %w", name, strings.TrimSpace(stderr.String()), err)
	}
	return l, nil
}

func parseListing(lines *bufio.Scanner, mine func(chain string) bool) (*listing, error) {
	l := &listing{referenced: map[string]bool{}}
	builtin := map[string]bool{}
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if rest, ok := strings.CutPrefix(line, ":"); ok {
			name, policy, _ := strings.Cut(rest, " ")
			if strings.HasPrefix(policy, "-") {
				l.chains = append(l.chains, name)
				if mine(name) {
					l.own.chains++
				}
			} else {
				builtin[name] = true
			}
			continue
		}
		rest, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		l.rules++
		l.signed = l.signed || slices.Contains(signatures, line)
		name, rule, _ := strings.Cut(rest, " ")
		switch {
		case builtin[name]:
			l.builtin = append(l.builtin, line)
		case mine(name):
			l.own.rules++
		default:
			l.referenced[jumpTarget(rule)] = true
		}
	}
	return l, lines.Err()
}

// jumpTarget is the target of a rule as iptables-save writes it, or "".
func jumpTarget(rule string) string {
	words := strings.Fields(rule)
	for i := len(words) - 2; i >= 0; i-- {
		if words[i] == "-j" || words[i] == "-g" {
			return words[i+1]
		}
	}
	return ""
}

// stale are the chains that Services had; those that none has any more are to
// be removed.
func (l *listing) stale() []string {
	used := make(map[string]bool)
	for _, line := range l.builtin {
		used[jumpTarget(line)] = true
	}
	var names []string
	for _, name := range l.chains {
		if isServiceChain(name) && !l.referenced[name] && !used[name] {
			names = append(names, name)
		}
	}
	return names
}
