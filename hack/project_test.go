// SPDX-License-Identifier: Apache-2.0

package hack

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

var dependencyRow = regexp.MustCompile("(?m)^\\| `([^`]+)` \\|")

// The page has a row for each direct dependency, and for no other module.
func TestDependenciesPage(t *testing.T) {
	page, err := os.ReadFile("../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, row := range dependencyRow.FindAllStringSubmatch(string(page), -1) {
		rows = append(rows, row[1])
	}
	slices.Sort(rows)
	if direct := directDependencies(t); !slices.Equal(rows, direct) {
		t.Errorf("docs/dependencies.md has the modules\n%q\nand go.mod requires\n%q", rows, direct)
	}
}

func directDependencies(t *testing.T) []string {
	t.Helper()
	text, err := exec.CommandContext(t.Context(), "go", "mod", "edit", "-json", "../go.mod").Output()
	if err != nil {
		t.Fatal(err)
	}
	var module struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(text, &module); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range module.Require {
		if !r.Indirect {
			out = append(out, r.Path)
		}
	}
	slices.Sort(out)
	return out
}

// Helm packages only files of the chart's folder, so the chart has copies.
func TestChartHasMonitoring(t *testing.T) {
	for _, name := range []string{"alerts.yaml", "dashboard.json"} {
		if read(t, "manifests/monitoring/"+name) != read(t, "manifests/helm/signalbox/files/"+name) {
			t.Errorf("%s differs: cp manifests/monitoring/* manifests/helm/signalbox/files/", name)
		}
	}
}

// Some checkouts turn symbolic links into text files. `make image-links` makes those of the images.
func TestNoSymbolicLinks(t *testing.T) {
	walk(t, func(path string, entry fs.DirEntry) {
		if entry.Type() == fs.ModeSymlink && !strings.HasPrefix(path, "hack/image/links/") {
			t.Errorf("%s is a symbolic link", path)
		}
	})
}

// An issueForm has what GitHub requires of a form.
type issueForm struct {
	Name, Description string
	Labels            []string
	Body              []struct {
		Type, ID    string
		Validations struct{ Required bool }
		Attributes  struct {
			Label, Value, Description, Render, Placeholder string
			Options                                        []string
		}
	}
}

func (f issueForm) faults() []string {
	var out []string
	if f.Name == "" || f.Description == "" || len(f.Body) == 0 {
		out = append(out, "name, description or body is missing")
	}
	seen := map[string]bool{}
	for i, field := range f.Body {
		if field.Type == "markdown" {
			continue
		}
		if !slices.Contains([]string{"textarea", "input", "dropdown"}, field.Type) || field.ID == "" || seen[field.ID] || field.Attributes.Label == "" {
			out = append(out, fmt.Sprintf("field %d: type %q, id %q (seen: %v), label %q", i, field.Type, field.ID, seen[field.ID], field.Attributes.Label))
		}
		seen[field.ID] = true
	}
	return out
}

func TestIssueForms(t *testing.T) {
	for _, name := range []string{"bug.yml", "feature.yml"} {
		text, err := os.ReadFile(filepath.Join("../.github/ISSUE_TEMPLATE", name))
		if err != nil {
			t.Fatal(err)
		}
		var form issueForm
		if err := yaml.UnmarshalStrict(text, &form); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, fault := range form.faults() {
			t.Errorf("%s: %s", name, fault)
		}
	}
}

// The first line of each Go file names the licence. golangci-lint's goheader accepts a file
// that begins with a build constraint.
func TestLicenceHeader(t *testing.T) {
	sources := files(t, ".go")
	if len(sources) < 500 {
		t.Fatalf("%d files only", len(sources))
	}
	for _, path := range sources {
		if !strings.HasPrefix(read(t, path), "// SPDX-License-Identifier: Apache-2.0\n\n") {
			t.Errorf("%s does not begin with its licence and an empty line", path)
		}
	}
}
