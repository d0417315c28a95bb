// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
)

// modes are the packages that serve a plan. Only modeTable imports them.
var modes = []string{"nftables", "iptables", "ipvs", "userspace"}

const (
	modeTable = "modes"
	contract  = "proxier" // of the daemon and the modes
	maxFiles  = 12
)

// violations lists what breaks the rules that docs/architecture.md states.
func violations(t tree) []string {
	var out []string
	for _, path := range t.paths() {
		out = append(out, t.importsMode(path)...)
		out = append(out, t.discoversCapability(path)...)
		switch mode := modeOf(path); {
		case mode != "":
			out = append(out, t.reachesKubernetes(path)...)
		case path == "proxier/plan":
			out = append(out, t.importsModule(path)...)
		case path == "nft":
			out = append(out, t.reachesServices(path)...)
		}
		if t[path].files > maxFiles {
			out = append(out, fmt.Sprintf("%s has more than %d files", path, maxFiles))
		}
	}
	return out
}

// modeOf returns the mode to which a package belongs, or "".
func modeOf(path string) string {
	first, _, _ := strings.Cut(path, "/")
	if slices.Contains(modes, first) {
		return first
	}
	return ""
}

func (t tree) importsMode(path string) []string {
	var out []string
	for _, to := range t.ours(path) {
		if mode := modeOf(to); mode != "" && mode != modeOf(path) && path != modeTable {
			out = append(out, fmt.Sprintf("%s imports the mode %s", path, mode))
		}
	}
	return out
}

// discoversCapability names the type assertions of a package that uses the contract
// and is no mode.
func (t tree) discoversCapability(path string) []string {
	var out []string
	if modeOf(path) == "" && slices.Contains(t.ours(path), contract) {
		for _, a := range t[path].assertions {
			out = append(out, fmt.Sprintf("%s asserts the type %s", path, a))
		}
	}
	return out
}

// reachesKubernetes names each package through which a mode depends on
// Kubernetes' packages. k8s.io/utils may be used: it knows nothing of Kubernetes.
func (t tree) reachesKubernetes(path string) []string {
	var out []string
	for _, p := range t.reach(path) {
		if other := modeOf(p); other != "" && other != modeOf(path) {
			continue
		}
		if slices.ContainsFunc(t[p].imports, func(i string) bool { return strings.HasPrefix(i, "k8s.io/") && !strings.HasPrefix(i, "k8s.io/utils/") }) {
			out = append(out, fmt.Sprintf("%s depends on Kubernetes through %s", path, p))
		}
	}
	return out
}

// importsModule names all imports that are not of the standard library.
func (t tree) importsModule(path string) []string {
	var out []string
	for _, i := range t[path].imports {
		if first, _, _ := strings.Cut(i, "/"); strings.Contains(first, ".") {
			out = append(out, fmt.Sprintf("%s imports %s", path, i))
		}
	}
	return out
}

// reachesServices names what knows Services. proxier/plan may be used: it has the IP
// families and protocols.
func (t tree) reachesServices(path string) []string {
	var out []string
	for _, p := range t.reach(path) {
		if p != "proxier/plan" && (p == "proxier" || strings.HasPrefix(p, "proxier/")) {
			out = append(out, fmt.Sprintf("%s depends on %s", path, p))
		}
	}
	return out
}
