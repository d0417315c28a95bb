// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
)

// layers groups the packages by the first element of their path.
var layers = []struct {
	name     string
	packages []string
}{
	{"commands", []string{"cmd"}},
	{"daemon", []string{"daemon", "config", "metrics", "health", "events", "explain"}},
	{"sources of objects", []string{"source"}},
	{"policy and sync", []string{"proxier"}},
	{"modes", []string{"modes", "nftables", "iptables", "ipvs", "userspace"}},
	{"nf_tables", []string{"nft"}},
	{"node", []string{"node", "conntrack", "kubeproxy"}},
}

// layerOf returns the index of a package's layer, or -1.
func layerOf(path string) int {
	first, _, _ := strings.Cut(path, "/")
	for i, l := range layers {
		if slices.Contains(l.packages, first) {
			return i
		}
	}
	return -1
}

// drawn says whether the picture shows a package.
func drawn(path string) bool {
	return path != "hack" && !strings.HasPrefix(path, "hack/") && !strings.Contains("/"+path+"/", "/internal/")
}

// picture draws the imports as a Mermaid flowchart. An import is left out where
// a longer way through the picture implies it.
func picture(t tree) (string, error) {
	t = t.drawn()
	boxes := make([]strings.Builder, len(layers))
	for _, path := range t.paths() {
		l := layerOf(path)
		if l < 0 {
			return "", fmt.Errorf("package %s is in no layer: add it to hack/architecture/picture.go", path)
		}
		fmt.Fprintf(&boxes[l], "        %s[%s]\n", id(path), path)
	}
	var b strings.Builder
	b.WriteString("```mermaid\nflowchart TD\n")
	for i, l := range layers {
		if boxes[i].Len() > 0 {
			fmt.Fprintf(&b, "    subgraph layer%d [%s]\n%s    end\n", i, l.name, boxes[i].String())
		}
	}
	for _, path := range t.paths() {
		for _, to := range t.ours(path) {
			if !t.implied(path, to) {
				fmt.Fprintf(&b, "    %s --> %s\n", id(path), id(to))
			}
		}
	}
	b.WriteString("```\n")
	return b.String(), nil
}

func id(path string) string { return strings.ReplaceAll(path, "/", "_") }

// drawn is the tree without the packages that the picture does not show. What
// imports one of these imports what that imports.
func (t tree) drawn() tree {
	out := tree{}
	for _, path := range t.paths() {
		if !drawn(path) {
			continue
		}
		p := &pkg{}
		for _, to := range t.throughHidden(path) {
			p.imports = append(p.imports, ourPrefix+to)
		}
		out[path] = p
	}
	return out
}

// throughHidden lists the drawn packages that a package imports itself or
// through packages that are not drawn.
func (t tree) throughHidden(path string) []string {
	var out []string
	for _, to := range t.ours(path) {
		if drawn(to) {
			out = append(out, to)
		} else {
			out = append(out, t.throughHidden(to)...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// implied says whether a package that path imports depends on to as well.
func (t tree) implied(path, to string) bool {
	return slices.ContainsFunc(t.ours(path), func(p string) bool {
		return p != to && slices.Contains(t.reach(p), to)
	})
}
