// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const root = "../.."

func TestRules(t *testing.T) {
	tree, err := readTree(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range append(slices.Clone(modes), modeTable, "proxier/plan") {
		if tree[p] == nil {
			t.Errorf("the rules name package %s, which does not exist", p)
		}
	}
	for _, v := range violations(tree) {
		t.Errorf("%s: see the rules in docs/architecture.md", v)
	}
}

func TestViolations(t *testing.T) {
	bad := tree{
		"config":         {imports: []string{"./modes"}, assertions: []string{"shaper"}},
		"daemon":         {imports: []string{"./ipvs", "./modes", "./proxier"}, assertions: []string{"drainer"}},
		"modes":          {imports: []string{"./ipvs", "./nftables"}},
		"ipvs":           {imports: []string{"./nftables", "./proxier"}, files: maxFiles + 1, assertions: []string{"shaper"}},
		"nftables":       {imports: []string{"./nft", "./nftables/rules"}, files: maxFiles},
		"nftables/rules": {imports: []string{"k8s.io/api/core/v1"}},
		"nft":            {imports: []string{"./internal/text"}},
		"internal/text":  {imports: []string{"./proxier", "./proxier/plan"}},
		"proxier":        {imports: []string{"k8s.io/api/core/v1", "k8s.io/utils/net", "./proxier/plan"}},
		"proxier/plan":   {imports: []string{"net/netip", "golang.org/x/sys/unix", "./node"}},
		"node":           {},
	}
	want := []string{
		"daemon imports the mode ipvs",
		"daemon asserts the type drainer",
		"ipvs imports the mode nftables",
		"ipvs depends on Kubernetes through proxier",
		"ipvs has more than 12 files",
		"nft depends on proxier",
		"nftables depends on Kubernetes through nftables/rules",
		"nftables depends on Kubernetes through proxier",
		"nftables/rules depends on Kubernetes through nftables/rules",
		"proxier/plan imports golang.org/x/sys/unix",
		"proxier/plan imports ./node",
	}
	if diff := cmp.Diff(want, violations(bad)); diff != "" {
		t.Errorf("violations (-want +got):\n%s", diff)
	}
}

func TestCapabilityAssertions(t *testing.T) {
	dir := t.TempDir()
	const text = `package p

type drainer interface{ Drain() }

type queue struct{}

func f(v any) {
	_ = v.(drainer)
	_ = v.(queue)
	_ = v.(*proxier.Defaults)
	_ = v.(*net.UnixConn)
	switch v.(type) {
	case interface{ Count() int }, *queue:
	case ipvs.Proxier:
	}
}
`
	if err := os.WriteFile(dir+"/p.go", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := capabilityAssertions(dir, []string{"p.go"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"drainer", "*proxier.Defaults", "interface{Count() int}", "ipvs.Proxier"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("assertions (-want +got):\n%s", diff)
	}
}

func TestPictureIsUpToDate(t *testing.T) {
	tree, err := readTree(root)
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(root + "/" + page)
	if err != nil {
		t.Fatal(err)
	}
	want, err := withPicture(old, tree)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(old, want) {
		t.Errorf("the imports have changed: run make architecture, and commit %s\n%s", page, cmp.Diff(string(old), string(want)))
	}
}

func TestPicture(t *testing.T) {
	got, err := picture(tree{
		"cmd/x":         {imports: []string{"./daemon", "./nft", "fmt"}},
		"daemon":        {imports: []string{"./internal/text"}},
		"internal/text": {imports: []string{"./nft"}},
		"nft":           {},
		"hack":          {imports: []string{"./daemon"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "```mermaid\n" + `flowchart TD
    subgraph layer0 [commands]
        cmd_x[cmd/x]
    end
    subgraph layer1 [daemon]
        daemon[daemon]
    end
    subgraph layer5 [nf_tables]
        nft[nft]
    end
    cmd_x --> daemon
    daemon --> nft
` + "```\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the picture (-want +got):\n%s", diff)
	}
	if _, err := picture(tree{"elsewhere": {}}); err == nil {
		t.Error("a package without a layer is drawn")
	}
}
