// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/tools/txtar"
)

//go:embed scenarios/*.txtar
var scenarioFiles embed.FS

// Scenario is one file of the contract: objects, and probes with what they must
// see. See scenarios/README.md for the language.
type Scenario struct {
	Name  string
	About string // what it shows, and which rule demands it
	Setup Setup

	manifests map[string]string // file name -> text, before symbols are replaced
	steps     []step
}

// Setup is where and how a scenario runs; every combination of Labs and
// DetectLocal is a run of its own.
type Setup struct {
	Labs        []string
	DetectLocal []string
	// Modes names the only modes that the scenario is for; empty for all. Why
	// says why the others do otherwise.
	Modes    []string
	Needs    []string // features of the kernel: "sctp"
	Families []string // "IPv4", "IPv6", or "both" for one run that serves both
	Why      string

	NodePortAddresses  []string
	ClusterCIDR        string
	MasqueradeAll      bool
	LocalhostNodePorts bool
	IgnoreExternalIPs  bool
	// ThreeNodes adds node3 with pod-e.
	ThreeNodes bool
	// DropForwarded gives node1 a firewall that drops what it forwards.
	DropForwarded bool
	// APIServers are the addresses and ports of API servers.
	APIServers []string
	// ResetRemovedEndpoints is service.Settings'.
	ResetRemovedEndpoints bool
	// KubeProxyIPVSPolicies is proxier.Settings'.
	KubeProxyIPVSPolicies bool
}

// Scenarios returns the contract, sorted by name.
func Scenarios() ([]*Scenario, error) {
	files, err := fs.Glob(scenarioFiles, "scenarios/*.txtar")
	if err != nil {
		return nil, err
	}
	var all []*Scenario
	for _, f := range files {
		text, err := scenarioFiles.ReadFile(f)
		if err != nil {
			return nil, err
		}
		s, err := parseScenario(f, text)
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	return all, nil
}

func parseScenario(file string, text []byte) (*Scenario, error) {
	ar := txtar.Parse(text)
	s := &Scenario{
		Name:      strings.TrimSuffix(path.Base(file), ".txtar"),
		About:     strings.TrimSpace(string(ar.Comment)),
		Setup:     Setup{Labs: []string{"routed"}, DetectLocal: []string{"ClusterCIDR"}, Families: []string{"IPv4", "IPv6"}, ClusterCIDR: "$clusterCIDR"},
		manifests: map[string]string{},
	}
	if s.About == "" {
		return nil, fmt.Errorf("%s: nothing says what the scenario shows", file)
	}
	for _, f := range ar.Files {
		var err error
		switch {
		case f.Name == "setup":
			err = s.Setup.parse(string(f.Data))
		case f.Name == "script":
			s.steps, err = parseScript(string(f.Data), lineOf(text, f.Data))
		case strings.HasSuffix(f.Name, ".yaml"):
			s.manifests[f.Name] = string(f.Data)
		default:
			err = errors.New("is neither setup, script nor a .yaml file")
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", file, f.Name, err)
		}
	}
	if len(s.steps) == 0 {
		return nil, fmt.Errorf("%s: there is no script", file)
	}
	return s, nil
}

// lineOf is the number of the line of text in which part begins.
func lineOf(text, part []byte) int {
	return 1 + bytes.Count(text[:bytes.LastIndex(text, part)], []byte("\n"))
}

func (s *Setup) parse(text string) error {
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		key, value, ok := strings.Cut(line, ":")
		if !ok {
			return fmt.Errorf("line %d: %q is not key: value", n+1, line)
		}
		if err := s.set(strings.TrimSpace(key), strings.TrimSpace(value)); err != nil {
			return fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	if (len(s.Modes) > 0 || len(s.Families) == 1 && s.Families[0] != "both") && s.Why == "" {
		return errors.New("why: must say why other modes or families are left out")
	}
	return nil
}

func (s *Setup) set(key, value string) (err error) {
	switch key {
	case "lab":
		s.Labs, err = listOf(value, "routed", "bridged", "routed-vxlan", "bridged-vxlan")
	case "detect-local":
		s.DetectLocal, err = listOf(value, "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
	case "families":
		s.Families, err = listOf(value, "IPv4", "IPv6", "both")
	case "modes":
		s.Modes, err = listOf(value)
	case "needs":
		s.Needs, err = listOf(value, "sctp")
	case "why":
		s.Why = value
	case "nodeport-addresses":
		s.NodePortAddresses, err = listOf(value)
	case "api-servers":
		s.APIServers, err = listOf(value)
	case "cluster-cidr":
		s.ClusterCIDR = value
	case "masquerade-all":
		s.MasqueradeAll, err = yes(value)
	case "localhost-nodeports":
		s.LocalhostNodePorts, err = yes(value)
	case "ignore-external-ips":
		s.IgnoreExternalIPs, err = yes(value)
	case "three-nodes":
		s.ThreeNodes, err = yes(value)
	case "drop-forwarded":
		s.DropForwarded, err = yes(value)
	case "reset-removed-endpoints":
		s.ResetRemovedEndpoints, err = yes(value)
	case "kube-proxy-ipvs-policies":
		s.KubeProxyIPVSPolicies, err = yes(value)
	default:
		err = fmt.Errorf("there is no setting %q", key)
	}
	return err
}

// listOf splits at commas; where allowed is given, it holds every valid word.
func listOf(value string, allowed ...string) ([]string, error) {
	var out []string
	for w := range strings.SplitSeq(value, ",") {
		w = strings.TrimSpace(w)
		if w == "" || len(allowed) > 0 && !slices.Contains(allowed, w) {
			return nil, fmt.Errorf("%q is not one of %v", w, allowed)
		}
		out = append(out, w)
	}
	return out, nil
}

func yes(value string) (bool, error) {
	if value != "yes" {
		return false, fmt.Errorf("%q: the only value is yes", value)
	}
	return true, nil
}

// isFor says whether the scenario is for a mode: "iptables" stands for every
// backend of that mode.
func (s *Setup) isFor(mode string) bool {
	return len(s.Modes) == 0 || slices.ContainsFunc(s.Modes, func(m string) bool {
		return mode == m || strings.HasPrefix(mode, m+"-")
	})
}
