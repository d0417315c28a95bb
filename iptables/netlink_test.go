// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/nstest"
	"signalbox/internal/xtables"
	"signalbox/proxier/plan"
)

// eachFamilyOfNFT runs the test for both families of the nft variant.
func eachFamilyOfNFT(t *testing.T, test func(t *testing.T, p *Proxier)) {
	for _, f := range plan.Families {
		t.Run(f.String(), func(t *testing.T) {
			nstest.Enter(t)
			test(t, newProxier(t, f, NFT))
		})
	}
}

// allForms are ruleForms, the matches on ports of SCTP and the range of all sources.
func allForms(f plan.Family) map[string][]string {
	forms := ruleForms(f)
	forms["filter"] = append(forms["filter"], map[plan.Family]string{plan.IPv4: " -s 0.0.0.0/0 -j RETURN", plan.IPv6: " -s ::/0 -j RETURN"}[f])
	forms["nat"] = append(forms["nat"], " -p sctp -m sctp --dport 80 -j RETURN", " -p sctp -m sctp --dport 4096:8191 -g "+probeChain)
	return forms
}

func useNetlink(t *testing.T, p *Proxier) {
	t.Helper()
	if err := p.tools.UseNetlink(context.Background(), slog.New(slog.DiscardHandler), probeChain, allForms(p.opts.Family)); err != nil {
		t.Fatal(err)
	}
	if left := saved(t, p); strings.Contains(left, probeChain) {
		t.Errorf("the check of netlink left\n%s", left)
	}
}

// whileNoToolStarts runs f while no tool can start.
func whileNoToolStarts(p *Proxier, f func()) {
	before := *p.tools
	p.tools.Command, p.tools.Restore, p.tools.Save = "/missing", "/missing", "/missing"
	defer func() { p.tools.Command, p.tools.Restore, p.tools.Save = before.Command, before.Restore, before.Save }()
	f()
}

// formsScript writes rules of every form to one chain of each table.
func formsScript(f plan.Family, name string) (s xtables.Script) {
	for table, rules := range allForms(f) {
		s.Add(table, []chain{{Name: probeChain}, {Name: name, Level: 1, Rules: rules}})
	}
	return s
}

// TestNetlinkWritesAsTheTools: iptables-nft-save prints every form of rule alike, whoever
// wrote it, and iptables-nft finds and deletes the rules.
func TestNetlinkWritesAsTheTools(t *testing.T) {
	eachFamilyOfNFT(t, func(t *testing.T, p *Proxier) {
		const name = "KUBE-SVC-FORMS"
		script := formsScript(p.opts.Family, name)
		must(t, p.tools.Apply(context.Background(), script))
		want := saved(t, p)

		nstest.Enter(t)
		useNetlink(t, p)
		whileNoToolStarts(p, func() { must(t, p.tools.Apply(context.Background(), script)) })
		if diff := cmp.Diff(want, saved(t, p)); diff != "" {
			t.Errorf("(-the tools wrote +netlink wrote)\n%s", diff)
		}
		for table, rules := range allForms(p.opts.Family) {
			for _, rule := range rules {
				for _, command := range []string{"-C", "-D"} {
					run(t, "", "sh", "-c", fmt.Sprintf("%s -t %s %s %s %s", p.tools.Command, table, command, name, rule))
				}
			}
		}
		if left := saved(t, p); strings.Contains(left, "-A "+name) {
			t.Errorf("rules that iptables-nft was told to delete:\n%s", left)
		}
		run(t, script.String(), p.tools.Restore, "--noflush")
		if diff := cmp.Diff(want, saved(t, p)); diff != "" {
			t.Errorf("(-the tools wrote first +the tools wrote over netlink's)\n%s", diff)
		}
	})
}

// TestChangesStartNoTool makes random changes while no tool can start. The kernel then has
// what the tools write.
func TestChangesStartNoTool(t *testing.T) {
	eachFamilyOfNFT(t, func(t *testing.T, p *Proxier) {
		w := newWorld(p.opts.Family, 3)
		desired := w.plan(60)
		mustSync(t, p, desired, plan.Change{All: true})
		whileNoToolStarts(p, func() {
			for range 6 {
				mustSync(t, p, desired, w.change(desired))
			}
		})
		compareCounts(t, p)
		compareWithFresh(t, p, desired)
	})
}

// TestKernelRefusesNetlink: the tools say which rule the kernel refuses, and the kernel has
// what it had.
func TestKernelRefusesNetlink(t *testing.T) {
	eachFamilyOfNFT(t, func(t *testing.T, p *Proxier) {
		useNetlink(t, p)
		before := saved(t, p)
		var script xtables.Script
		script.Add("nat", []chain{{Name: "KUBE-SVC-X", Rules: []string{" -p tcp -j RETURN", " -j REJECT"}, Owners: []string{"ns/a", "ns/b"}}})
		err := p.tools.Apply(context.Background(), script)
		if err == nil || !strings.Contains(err.Error(), "ns/b") {
			t.Errorf("a rule that the table nat cannot have: %v", err)
		}
		if diff := cmp.Diff(before, saved(t, p)); diff != "" {
			t.Errorf("a refused change changed\n%s", diff)
		}
	})
}

// TestToolsThatReadNetlinkOtherwise lets iptables-nft list netlink's rules as others. The
// tools then write all changes.
func TestToolsThatReadNetlinkOtherwise(t *testing.T) {
	eachFamilyOfNFT(t, func(t *testing.T, p *Proxier) {
		command := p.tools.Command
		p.tools.Command = filepath.Join(t.TempDir(), "iptables")
		script := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in\n*-N) %s \"$@\" | sed s/RETURN/ACCEPT/ ;;\n*) exec %[1]s \"$@\" ;;\nesac\n", command)
		if err := os.WriteFile(p.tools.Command, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		desired := newWorld(p.opts.Family, 4).plan(3)
		mustSync(t, p, desired, plan.Change{All: true})
		if left := saved(t, p); strings.Contains(left, probeChain) {
			t.Errorf("the check of netlink left\n%s", left)
		}
		note := recorded(t, p)
		names := slices.Collect(maps.Keys(desired.Services))
		clear(desired.Services)
		mustSync(t, p, desired, plan.Change{Services: names})
		if n := restores(t, note); n != 1 {
			t.Errorf("a change took %d restores, want 1", n)
		}
	})
}
