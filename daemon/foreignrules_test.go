// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"signalbox/internal/nstest"
	"signalbox/modes"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// What could not be removed is tried again, and told of until it is gone; not
// so what may be another kube-proxy's by then.
func TestFailedRemovalIsRepeated(t *testing.T) {
	var log strings.Builder
	present := false
	l := newForeignRules(foreignRulesOptions{
		choice:  modes.Choice{Families: []plan.Family{plan.IPv4}},
		present: func(_ plan.Family, is bool) { present = is },
		log:     slog.New(slog.NewTextHandler(&log, nil)),
	})
	l.removeUntil = time.Now().Add(time.Hour)
	tries := map[string]int{}
	failing := func(what string, times int, kubeProxy bool) removal {
		return removal{what: what, kubeProxy: kubeProxy, remove: func(plan.Family) (bool, int, error) {
			if tries[what]++; tries[what] <= times {
				return false, 0, errors.New("busy")
			}
			return true, 0, nil
		}}
	}
	l.remove(plan.IPv4, []removal{failing("ours", 2, false), failing("theirs", 1, true), failing("nothing", 0, false)})
	l.reportPresent()
	if !present {
		t.Error("nobody is told of what could not be removed")
	}
	l.removeUntil = time.Now().Add(-time.Hour)
	l.removeAgain(plan.IPv4)
	l.removeAgain(plan.IPv4)
	l.removeAgain(plan.IPv4)
	if tries["ours"] != 3 || tries["theirs"] != 1 || tries["nothing"] != 1 {
		t.Errorf("tried %v", tries)
	}
	l.reportPresent()
	if !present {
		t.Error("what is kube-proxy's is taken for removed")
	}
	l.removeUntil = time.Now().Add(time.Hour)
	l.removeAgain(plan.IPv4)
	l.reportPresent()
	if present {
		t.Error("all is removed and nobody is told")
	}
	if n := strings.Count(log.String(), "WARN"); n != 2 {
		t.Errorf("%d warnings about two things:\n%s", n, &log)
	}
}

// TestChecksStartNoProgram: the checks of each minute start no program while nobody writes
// chains of kube-proxy. They find such chains in both variants.
func TestChecksStartNoProgram(t *testing.T) {
	for _, name := range []string{"nftables", "iptables"} {
		for _, tools := range []string{"iptables-nft", "iptables-legacy"} {
			t.Run(name+" "+tools, func(t *testing.T) {
				nstest.Enter(t)
				started := recordPrograms(t)
				l := rulesOfMode(t, name)
				run := func(args ...string) {
					t.Helper()
					if out, err := exec.Command(tools, args...).CombinedOutput(); err != nil {
						t.Fatalf("%s %s: %v: %s", tools, args, err, out)
					}
				}
				run("-t", "mangle", "-N", "OTHER")
				run("-t", "nat", "-N", "OTHER")
				l.check(t.Context(), plan.IPv4) // the first may read more
				started()
				l.check(t.Context(), plan.IPv4)
				if got := started(); got != "" || l.logged[plan.IPv4] {
					t.Errorf("kube-proxy is found: %v; the check starts\n%s", l.logged[plan.IPv4], got)
				}
				run("-t", "mangle", "-N", "KUBE-PROXY-CANARY")
				started()
				l.check(t.Context(), plan.IPv4)
				if got := started(); got == "" || !l.logged[plan.IPv4] {
					t.Errorf("kube-proxy is found: %v; the check starts %q", l.logged[plan.IPv4], got)
				}
			})
		}
	}
}

// rulesOfMode are the foreign rules beside a mode that has written a plan without Services.
func rulesOfMode(t *testing.T, name string) *foreignRules {
	t.Helper()
	mode, err := modes.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := mode.New(proxier.Options{Family: plan.IPv4, MasqueradeMark: proxier.DefaultMasqueradeMark})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if err := p.Sync(t.Context(), &plan.Plan{Family: plan.IPv4}, plan.Change{All: true}); err != nil {
		t.Fatal(err)
	}
	l := newForeignRules(foreignRulesOptions{
		choice: modes.Choice{Mode: mode, Families: []plan.Family{plan.IPv4}}, proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: p},
		fullWrite: func() { t.Error("rules count as replaced") }, log: slog.New(slog.DiscardHandler),
	})
	l.hadKubeProxy, l.logged = map[plan.Family]bool{}, map[plan.Family]bool{}
	return l
}

// recordPrograms puts programs in front of the iptables tools that record each start.
// started returns the records since its last call.
func recordPrograms(t *testing.T) (started func() string) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	script := fmt.Sprintf("#!/bin/sh\necho ${0##*/} $* >>%s\nPATH=%s\nexec ${0##*/} \"$@\"\n", log, os.Getenv("PATH"))
	for _, base := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			for _, program := range []string{"", "-save", "-restore"} {
				if err := os.WriteFile(filepath.Join(dir, base+variant+program), []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		text, _ := os.ReadFile(log) // absent before the first start
		os.Remove(log)
		return string(text)
	}
}
