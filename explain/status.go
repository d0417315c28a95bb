// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Status says how a daemon is. docs/explain.md documents its JSON form.
type Status struct {
	Version string `json:"version"`
	Node    string `json:"node"`
	Mode    string `json:"mode"`
	// ModeReason says why this mode serves.
	ModeReason string    `json:"modeReason"`
	Started    time.Time `json:"started"`
	// Origin says where the objects come from, and FailingRequests which of the
	// requests to the API server fail.
	Origin          string           `json:"origin"`
	FailingRequests []FailingRequest `json:"failingRequests,omitempty"`
	Objects         Objects          `json:"objects"`
	Families        []FamilyStatus   `json:"families"`
	// Problems are about the node and the configuration.
	Problems []string `json:"problems,omitempty"`
	// ObjectProblems are about the first maxObjects of ObjectsWithProblems.
	ObjectProblems      []ObjectProblem `json:"objectProblems,omitempty"`
	ObjectsWithProblems int             `json:"objectsWithProblems"`
	// Busy says why the answer is without NotServed and ObjectProblems.
	Busy string `json:"busy,omitempty"`
}

// FailingRequest is a kind of object that the API server does not give.
type FailingRequest struct {
	Resource string    `json:"resource"`
	Since    time.Time `json:"since"`
	Error    string    `json:"error"`
}

// ObjectProblem says what in an object is not served as the object asks.
type ObjectProblem struct {
	Kind   string    `json:"kind"`
	Object string    `json:"object"`
	Field  string    `json:"field"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}

// String follows "the API server".
func (r FailingRequest) String() string {
	return fmt.Sprintf("gives no %s since %s: %s", r.Resource, r.Since.Format(time.RFC3339), r.Error)
}

// Objects counts the objects that exist.
type Objects struct {
	Services       int `json:"services"`
	EndpointSlices int `json:"endpointSlices"`
	Nodes          int `json:"nodes"`
	ServiceCIDRs   int `json:"serviceCIDRs"`
}

// FamilyStatus is about one IP family.
type FamilyStatus struct {
	Family       string `json:"family"`
	ServicePorts int    `json:"servicePorts"`
	// Endpoints that still answer, counted for each Service port that they serve.
	Endpoints int `json:"endpoints"`
	// PendingSince is the time of the oldest update that the kernel lacks.
	PendingSince *time.Time     `json:"pendingSince,omitempty"`
	LastSync     *LastSync      `json:"lastSync,omitempty"`
	Kernel       []KernelObject `json:"kernel,omitempty"`
	// NotServed has what is in quarantine.
	NotServed []NotServed `json:"notServed,omitempty"`
}

// LastSync is about the last sync of a family.
type LastSync struct {
	At           time.Time `json:"at"`
	TookMillis   float64   `json:"tookMillis"`
	ServicePorts int       `json:"servicePorts"` // to write or remove
	Everything   bool      `json:"everything"`   // everything was written anew
	Error        string    `json:"error,omitempty"`
}

// KernelObject counts what the mode keeps in the kernel.
type KernelObject struct {
	Kind  string `json:"kind"`
	Count int    `json:"count"`
}

// NotServed is a Service, or a port of one, that the kernel lacks in its planned form.
type NotServed struct {
	Service string    `json:"service"`
	Reason  string    `json:"reason"`
	Since   time.Time `json:"since"`
}

// Diff says how the kernel differs from what the daemon wrote.
type Diff struct {
	Mode     string       `json:"mode"`
	Families []FamilyDiff `json:"families"`
}

// FamilyDiff is about one IP family.
type FamilyDiff struct {
	Family string `json:"family"`
	// Lines begin with "-" if something is missing in the kernel, and with "+" if it is
	// not signalbox's. Other lines say what differs in words.
	Lines []string `json:"lines"`
	// Error says why the kernel was not compared.
	Error string `json:"error,omitempty"`
}

// Print writes the lines of each family below its name, as `signalbox render` does.
func (d *Diff) Print(w io.Writer) {
	for _, f := range d.Families {
		if len(f.Lines) == 0 && f.Error == "" {
			continue
		}
		fmt.Fprintf(w, "# %s\n", f.Family)
		for _, line := range f.Lines {
			fmt.Fprintln(w, line)
		}
		if f.Error != "" {
			fmt.Fprintf(w, "mode %s is not compared: %s\n", d.Mode, f.Error)
		}
	}
}

// ExitCode is that of diff(1): 0 if nothing differs, 1 if something does, and 2 if a
// family was not compared.
func (d *Diff) ExitCode() (code int) {
	for _, f := range d.Families {
		switch {
		case f.Error != "":
			return 2
		case len(f.Lines) > 0:
			code = 1
		}
	}
	return code
}

// Well says whether everything is served as its objects ask, and follows the cluster.
func (s *Status) Well() bool {
	wrong := len(s.FailingRequests)+len(s.Problems)+s.ObjectsWithProblems > 0 || s.Busy != ""
	return !wrong && !slices.ContainsFunc(s.Families, func(f FamilyStatus) bool {
		return len(f.NotServed) > 0 || f.LastSync == nil || f.LastSync.Error != ""
	})
}

// Print writes the status for people.
func (s *Status) Print(w io.Writer) {
	lines := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(lines, "version\t%s, since %s\n", s.Version, s.Started.Format(time.RFC3339))
	fmt.Fprintf(lines, "node\t%s\n", s.Node)
	fmt.Fprintf(lines, "mode\t%s (%s)\n", s.Mode, s.ModeReason)
	fmt.Fprintf(lines, "objects\tServices: %d, EndpointSlices: %d, Nodes: %d, ServiceCIDRs: %d; from %s\n",
		s.Objects.Services, s.Objects.EndpointSlices, s.Objects.Nodes, s.Objects.ServiceCIDRs, s.Origin)
	for _, r := range s.FailingRequests {
		fmt.Fprintf(lines, "API server\t%s\n", r)
	}
	for i := range s.Families {
		s.Families[i].print(lines)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(lines, "problem\t%s\n", p)
	}
	listed := map[string]bool{}
	for _, p := range s.ObjectProblems {
		listed[p.Kind+p.Object] = true
		fmt.Fprintf(lines, "object problem\t%s %s since %s: %s: %s\n", p.Kind, p.Object, p.Since.Format(time.RFC3339), p.Field, p.Reason)
	}
	if more := s.ObjectsWithProblems - len(listed); more > 0 {
		fmt.Fprintf(lines, "object problem\tand %d more objects\n", more)
	}
	if s.Busy != "" {
		fmt.Fprintf(lines, "not known\twhich Services are in quarantine, and which objects have problems: %s\n", s.Busy)
	}
	lines.Flush()
}

func (f *FamilyStatus) print(w io.Writer) {
	fmt.Fprintf(w, "%s\tService ports: %d, endpoints: %d\n", f.Family, f.ServicePorts, f.Endpoints)
	if last := f.LastSync; last != nil {
		what := fmt.Sprintf("Service ports: %d", last.ServicePorts)
		if last.Everything {
			what = "everything"
		}
		fmt.Fprintf(w, "  last sync\t%s, %s, in %v\n", last.At.Format(time.RFC3339), what, time.Duration(last.TookMillis*float64(time.Millisecond)).Round(time.Microsecond))
		if last.Error != "" {
			fmt.Fprintf(w, "  failed\t%s\n", last.Error)
		}
	}
	if f.PendingSince != nil {
		fmt.Fprintf(w, "  updates wait\tsince %s\n", f.PendingSince.Format(time.RFC3339))
	}
	var kernel []string
	for _, k := range f.Kernel {
		kernel = append(kernel, fmt.Sprintf("%s: %d", k.Kind, k.Count))
	}
	if len(kernel) > 0 {
		fmt.Fprintf(w, "  in the kernel\t%s\n", strings.Join(kernel, ", "))
	}
	for _, n := range f.NotServed {
		fmt.Fprintf(w, "  not served\t%s since %s: %s\n", n.Service, n.Since.Format(time.RFC3339), n.Reason)
	}
}
