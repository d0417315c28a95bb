// SPDX-License-Identifier: Apache-2.0

package compare

import (
	_ "embed"
	"fmt"
	"regexp"
	"slices"

	"sigs.k8s.io/yaml"
)

//go:embed differences.yaml
var differencesFile []byte

// Rule is a deliberate difference between kube-proxy and signalbox: a row of a table in
// docs/compatibility.md.
type Rule struct {
	// Table is the heading of the table.
	Table string `json:"table"`
	// KubeProxy and Signalbox say what each does.
	KubeProxy string `json:"kubeProxy"`
	Signalbox string `json:"signalbox"`
	// Reason says why, for rows that a comparison meets.
	Reason string `json:"reason,omitempty"`
	// Seen are the forms in which a comparison meets the difference.
	Seen []Pattern `json:"seen,omitempty"`
}

// Pattern matches differences. An empty field matches everything.
type Pattern struct {
	KubeProxyModes []string `json:"kubeProxyModes,omitempty"`
	Modes          []string `json:"modes,omitempty"`
	Clients        []string `json:"clients,omitempty"`
	Networks       []string `json:"networks,omitempty"`
	Frontends      []string `json:"frontends,omitempty"`
	// SourceRanges means only Services with source ranges.
	SourceRanges bool `json:"sourceRanges,omitempty"`
	// Targets is a regular expression for the address that is tried. KubeProxy and
	// Signalbox are for the parts of an outcome that the other outcome does not have.
	Targets   string `json:"targets,omitempty"`
	KubeProxy string `json:"kubeProxy"`
	Signalbox string `json:"signalbox"`

	targets, kubeProxy, signalbox *regexp.Regexp
}

// deliberate reads the embedded file.
func deliberate() ([]Rule, error) {
	var rules []Rule
	if err := yaml.UnmarshalStrict(differencesFile, &rules); err != nil {
		return nil, fmt.Errorf("differences.yaml: %w", err)
	}
	for i := range rules {
		for j := range rules[i].Seen {
			if err := rules[i].Seen[j].compile(); err != nil {
				return nil, fmt.Errorf("differences.yaml: %s: %w", rules[i].KubeProxy, err)
			}
		}
	}
	return rules, nil
}

func (p *Pattern) compile() (err error) {
	if p.Targets == "" {
		p.Targets = ".*"
	}
	for _, e := range []struct {
		text string
		to   **regexp.Regexp
	}{{p.Targets, &p.targets}, {p.KubeProxy, &p.kubeProxy}, {p.Signalbox, &p.signalbox}} {
		if *e.to, err = regexp.Compile("^(" + e.text + ")$"); err != nil {
			return err
		}
	}
	return nil
}

func (r *Rule) explains(cfg Config, d Difference) bool {
	return slices.ContainsFunc(r.Seen, func(p Pattern) bool { return p.matches(cfg, d) })
}

func (p *Pattern) matches(cfg Config, d Difference) bool {
	allows := func(wanted []string, value string) bool { return len(wanted) == 0 || slices.Contains(wanted, value) }
	if p.SourceRanges && !d.Case.States[d.State].restricted() {
		return false
	}
	return allows(p.KubeProxyModes, cfg.KubeProxyMode) && allows(p.Modes, cfg.Mode) &&
		allows(p.Clients, d.Probe.Client) && allows(p.Networks, d.Probe.Network) && allows(p.Frontends, d.Probe.Frontend) &&
		p.targets.MatchString(d.Probe.Target.Addr().String()) &&
		p.kubeProxy.MatchString(d.KubeProxy.without(d.Signalbox).String()) && p.signalbox.MatchString(d.Signalbox.without(d.KubeProxy).String())
}
