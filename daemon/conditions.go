// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"signalbox/node"
)

// The subjects of conditions, in the order in which they are listed.
const (
	nodeName = iota
	manifests
	routeSources
	savedState
	unsavedState
	subjects // their number
)

// conditions are the faults with which the daemon serves on: a manifest that cannot be
// used, a Node object that is missing, routes whose source is not used, a saved state in
// place of the API server's, a state that cannot be saved. Health and `signalbox ready`
// list them; no status follows from them.
type conditions struct {
	mu    sync.Mutex // guards texts
	texts [subjects][]string
}

// set replaces the faults of a subject; no text means that all is well.
func (c *conditions) set(subject int, texts ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.texts[subject] = texts
}

func (c *conditions) list() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Concat(c.texts[:]...)
}

// sysctlProblems are the kernel settings that could not be made. Everything that needs
// none of them is served. Metrics, health and the log name them.
type sysctlProblems struct {
	log    *slog.Logger
	report func(name string, err error) // called for each setting that may have changed; nil: it is right

	mu      sync.Mutex                       // guards byOwner
	byOwner map[string][]*node.KernelProblem // who needs them -> those that could not be made
}

func newSysctlProblems(log *slog.Logger, report func(name string, err error)) *sysctlProblems {
	return &sysctlProblems{log: log, report: report, byOwner: map[string][]*node.KernelProblem{}}
}

// set replaces the problems with the settings that one part of the daemon needs.
func (s *sysctlProblems) set(who string, problems []*node.KernelProblem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.byOwner[who]
	if len(old)+len(problems) == 0 {
		return // as after nearly every sync
	}
	before := s.byName()
	s.byOwner[who] = problems
	now := s.byName()
	for _, p := range problems {
		if was := before[p.Name()]; was == nil || was.Error() != p.Error() {
			s.log.Warn("a kernel setting is not as it should be", "file", p.File, "wanted", p.Wanted, "found", p.Found, "error", p.Err,
				"without", cmp.Or(p.Impact, "the kernel's value counts"), "remedy", p.Remedy())
		}
		s.report(p.Name(), p)
	}
	for _, p := range old {
		if now[p.Name()] == nil {
			s.log.Info("a kernel setting is as it should be again", "file", p.File)
			s.report(p.Name(), nil)
		}
	}
}

func (s *sysctlProblems) byName() map[string]*node.KernelProblem {
	all := map[string]*node.KernelProblem{}
	for _, problems := range s.byOwner {
		for _, p := range problems {
			all[p.Name()] = p
		}
	}
	return all
}

// names returns the names that sysctl(8) uses, sorted.
func (s *sysctlProblems) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.byName()))
}
