package daemon

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"signalbox/node"
)

// settings are the kernel settings that are not as they should be. Everything
// that needs none of them is served, and metrics, health and the log tell which
// they are.
type settings struct {
	log  *slog.Logger
	told func(name string, err error) // of each whenever that may have changed

	mu      sync.Mutex                       // guards missing
	missing map[string][]*node.KernelProblem // who needs them -> those that could not be made
}

func newSettings(log *slog.Logger, told func(name string, err error)) *settings {
	return &settings{log: log, told: told, missing: map[string][]*node.KernelProblem{}}
}

// note takes in what could not be made of the settings that someone needs.
func (s *settings) note(who string, problems []*node.KernelProblem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.missing[who]
	if len(old)+len(problems) == 0 {
		return // as after nearly every sync
	}
	before := s.byName()
	s.missing[who] = problems
	now := s.byName()
	for _, p := range problems {
		if was := before[p.Name()]; was == nil || was.Error() != p.Error() {
			s.log.Warn("a kernel setting is not as it should be", "file", p.File, "wanted", p.Wanted, "found", p.Found, "error", p.Err,
				"without", cmp.Or(p.Impact, "the kernel's value counts"), "remedy", p.Remedy())
		}
		s.told(p.Name(), p)
	}
	for _, p := range old {
		if now[p.Name()] == nil {
			s.log.Info("a kernel setting is as it should be again", "file", p.File)
			s.told(p.Name(), nil)
		}
	}
}

func (s *settings) byName() map[string]*node.KernelProblem {
	all := map[string]*node.KernelProblem{}
	for _, problems := range s.missing {
		for _, p := range problems {
			all[p.Name()] = p
		}
	}
	return all
}

// names returns what sysctl(8) calls them, sorted.
func (s *settings) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.byName()))
}
