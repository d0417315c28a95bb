// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier/plan"
)

// recorded makes p run its restores through a program that notes each in a
// file, which it returns. The check of netlink with probeChain does not count.
func recorded(t *testing.T, p *Proxier) (note string) {
	t.Helper()
	dir := t.TempDir()
	note = filepath.Join(dir, "note")
	path := filepath.Join(dir, "restore")
	script := fmt.Sprintf("#!/bin/sh\ninput=$(cat)\ncase $input in *%s*) ;; *) echo restore >> %s ;; esac\nprintf '%%s\\n' \"$input\" | exec %s \"$@\"\n",
		probeChain, note, p.tools.Restore)
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	p.tools.Restore = path
	return note
}

// restores is how many restores were noted.
func restores(t *testing.T, note string) int {
	t.Helper()
	text, err := os.ReadFile(note)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(text), "\n")
}

// A new process that finds what it would write runs no restore, whatever the
// tables went through before. What changed in between it corrects.
func TestResume(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 4)
		desired := w.plan(60)
		mustSync(t, p, desired, plan.Change{All: true})
		for round := range 4 {
			for range 3 {
				mustSync(t, p, desired, w.change(desired))
			}
			rules := wholeSave(t, p)
			p = newProxier(t, p.opts.Family, p.tools.Backend)
			note := recorded(t, p)
			mustSync(t, p, desired, plan.Change{})
			if n := restores(t, note); n != 0 {
				t.Errorf("round %d: with nothing changed, %d restores", round, n)
			}
			if diff := cmp.Diff(rules, wholeSave(t, p)); diff != "" {
				t.Errorf("round %d: with nothing changed (-before +after)\n%s", round, diff)
			}
			// It goes on from there.
			mustSync(t, p, desired, w.change(desired))

			w.change(desired)
			p = newProxier(t, p.opts.Family, p.tools.Backend)
			mustSync(t, p, desired, plan.Change{})
			compareWithFresh(t, p, desired)
		}
	})
}

// compareWithFresh fails unless the kernel holds what one sync of everything
// would write.
func compareWithFresh(t *testing.T, p *Proxier, desired *plan.Plan) {
	t.Helper()
	got := saved(t, p)
	mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), planOf(p.opts.Family), plan.Change{All: true})
	mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{All: true})
	if diff := cmp.Diff(sortedLines(saved(t, p)), sortedLines(got)); diff != "" {
		t.Errorf("(-anew +found)\n%s", diff)
	}
}

// Tables that are not quite what an earlier process left are put right.
func TestResumeDamaged(t *testing.T) {
	for name, damage := range map[string][]string{
		"a rule is gone":     {"-t", "nat", "-D", "KUBE-POSTROUTING", "1"},
		"a rule is new":      {"-t", "filter", "-I", "KUBE-FORWARD", "-j", "DROP"},
		"a chain is new":     {"-t", "nat", "-N", "KUBE-SVC-NEW"},
		"a chain is flushed": {"-t", "nat", "-F", "KUBE-SERVICES"},
		"a jump is gone":     {"-t", "nat", "-D", "PREROUTING", "1"},
		"nothing is left":    {"-t", "nat", "-F"},
		"a rule is another":  {"-t", "nat", "-R", "KUBE-MARK-MASQ", "1", "-j", "RETURN"},
	} {
		t.Run(name, func(t *testing.T) {
			eachVariant(t, func(t *testing.T, p *Proxier) {
				desired := newWorld(p.opts.Family, 4).plan(20)
				mustSync(t, p, desired, plan.Change{All: true})
				before := sortedLines(saved(t, p))
				if out, err := exec.CommandContext(context.Background(), p.tools.Command, damage...).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				mustSync(t, newProxier(t, p.opts.Family, p.tools.Backend), desired, plan.Change{})
				if diff := cmp.Diff(before, sortedLines(saved(t, p))); diff != "" {
					t.Errorf("(-before +after)\n%s", diff)
				}
			})
		})
	}
}
