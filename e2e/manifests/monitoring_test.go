// SPDX-License-Identifier: Apache-2.0

package manifests

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

// series are the names that docs/observability.md lists, each with its type
// and labels. A test of the metrics package holds that page to the truth.
type series map[string]struct {
	kind   string
	labels []string
}

var (
	tableRow = regexp.MustCompile("^\\| (`[^|]+`) \\|([^|]*)\\|([^|]*)\\|")
	quoted   = regexp.MustCompile("`([^`]+)`")
)

func documentedSeries(t *testing.T) series {
	t.Helper()
	text, err := os.ReadFile("../../docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	all := series{}
	for line := range strings.Lines(string(text)) {
		row := tableRow.FindStringSubmatch(line)
		if row == nil || !strings.Contains(row[1], "_") {
			continue
		}
		var first string
		for _, name := range quoted.FindAllStringSubmatch(row[1], -1) {
			entry := all[""]
			entry.kind = strings.TrimSpace(row[2])
			entry.labels = strings.FieldsFunc(row[3], func(r rune) bool { return r == ',' || r == ' ' })
			if rest, short := strings.CutPrefix(name[1], "…"); short {
				all[sameLength(first, rest)] = entry
				continue
			}
			first = name[1]
			all[first] = entry
		}
	}
	if len(all) < 20 {
		t.Fatalf("the page lists %d series only: has its form changed?", len(all))
	}
	return all
}

// sameLength puts an abbreviated name's end in the place of as many words at
// the end of the name that stands before it.
func sameLength(full, end string) string {
	words := strings.Split(full, "_")
	keep := len(words) - strings.Count(end, "_")
	return strings.Join(words[:keep], "_") + end
}

// find looks up a series by its name in a query. The series of a histogram have
// suffixes. A name with * at its end stands for a group on the page.
func (all series) find(name string) (labels []string, group, ok bool) {
	for suffix, le := range map[string]string{"": "", "_bucket": "le", "_sum": "", "_count": ""} {
		entry, ok := all[strings.TrimSuffix(name, suffix)]
		if !ok || suffix != "" && (!strings.HasSuffix(name, suffix) || entry.kind != "histogram") {
			continue
		}
		return append(slices.Clone(entry.labels), le), false, true
	}
	for pattern := range all {
		if prefix, is := strings.CutSuffix(pattern, "*"); is && strings.HasPrefix(name, prefix) {
			return nil, true, true
		}
	}
	return nil, false, false
}

var promql = parser.NewParser(parser.Options{})

// check wants every series of an expression to exist, with every label that it
// is selected by.
func (all series) check(t *testing.T, where, expression string) {
	t.Helper()
	// Grafana's variables become what they stand for.
	expression = strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*", "$ip_family", ".*").Replace(expression)
	e, err := promql.ParseExpr(expression)
	if err != nil {
		t.Errorf("%s: %v in %s", where, err, expression)
		return
	}
	known := []string{"instance", "le"}
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		selector, is := n.(*parser.VectorSelector)
		if !is || selector.Name == "up" { // Prometheus' own
			return nil
		}
		labels, group, ok := all.find(selector.Name)
		if !ok {
			t.Errorf("%s: there is no series %s", where, selector.Name)
			return nil
		}
		if group {
			known = append(known, "code", "method", "host", "verb")
			return nil
		}
		known = append(known, labels...)
		for _, m := range selector.LabelMatchers {
			if m.Name != model.MetricNameLabel && m.Name != "instance" && !slices.Contains(labels, m.Name) {
				t.Errorf("%s: %s has no label %s", where, selector.Name, m.Name)
			}
		}
		return nil
	})
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		if by, is := n.(*parser.AggregateExpr); is {
			for _, label := range by.Grouping {
				if !slices.Contains(known, label) {
					t.Errorf("%s: nothing in %s has the label %s", where, expression, label)
				}
			}
		}
		return nil
	})
}

func TestAlerts(t *testing.T) {
	groups, errs := rulefmt.ParseFile(filepath.Join(root, "monitoring/alerts.yaml"), false, model.LegacyValidation, promql, slog.Default())
	for _, err := range errs {
		t.Error(err)
	}
	if t.Failed() {
		t.FailNow()
	}
	all, rules := documentedSeries(t), 0
	for _, g := range groups.Groups {
		for _, rule := range g.Rules {
			rules++
			all.check(t, rule.Alert, rule.Expr)
			for _, need := range []string{"summary", "description"} {
				if rule.Annotations[need] == "" {
					t.Errorf("%s has no %s", rule.Alert, need)
				}
			}
			if rule.Labels["severity"] == "" {
				t.Errorf("%s has no severity", rule.Alert)
			}
		}
	}
	if rules == 0 {
		t.Error("there are no rules")
	}
}

func TestDashboard(t *testing.T) {
	var dashboard struct {
		UID, Title string
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     struct{ H, W, X, Y int }
			Targets     []struct{ RefID, Expr string }
		}
	}
	if err := json.Unmarshal([]byte(monitoring(t, "dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	all, ids, queries := documentedSeries(t), map[int]bool{}, 0
	for _, v := range dashboard.Templating.List {
		if name, _, found := strings.Cut(strings.TrimPrefix(v.Definition, "label_values("), ","); found {
			if _, _, ok := all.find(name); !ok {
				t.Errorf("variable %s: there is no series %s", v.Name, name)
			}
		}
	}
	for i, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("%s: the id %d is there twice", p.Title, p.ID)
		}
		ids[p.ID] = true
		for _, other := range dashboard.Panels[:i] {
			a, b := p.GridPos, other.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("%s lies on %s", p.Title, other.Title)
			}
		}
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s asks for nothing", p.Title)
		}
		for _, target := range p.Targets {
			queries++
			all.check(t, p.Title, target.Expr)
		}
	}
	if dashboard.UID == "" || queries == 0 {
		t.Errorf("uid %q, %d queries", dashboard.UID, queries)
	}
}
