// SPDX-License-Identifier: Apache-2.0

package kernel

import "fmt"

// Schedulers remembers which schedulers the kernel has.
type Schedulers struct {
	ask   func(name string) (bool, error)
	known map[string]bool // the kernel's answers
}

// NewSchedulers returns schedulers that ask the kernel with ask.
func NewSchedulers(ask func(string) (bool, error)) *Schedulers {
	return &Schedulers{ask: ask, known: make(map[string]bool)}
}

// ErrNoScheduler says which module the kernel lacks.
func ErrNoScheduler(name string) error {
	return fmt.Errorf("the kernel has no scheduler %s: load the module ip_vs_%s (modprobe ip_vs_%s)", name, name, name)
}

// Has says whether the kernel has a scheduler. If the kernel does not answer, Has says yes:
// the kernel refuses the virtual server later, with a reason.
func (s *Schedulers) Has(name string) bool {
	has, known := s.known[name]
	if known {
		return has
	}
	has, err := s.ask(name)
	if err != nil {
		return true
	}
	s.known[name] = has
	return has
}

// ForgetMissing has the kernel asked again for missing schedulers: an administrator can
// load a module later.
func (s *Schedulers) ForgetMissing() {
	for name, has := range s.known {
		if !has {
			delete(s.known, name)
		}
	}
}
