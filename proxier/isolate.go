package proxier

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

const (
	// maxBlame is after how many refusals a search ends in which nothing went
	// in: the fault is hardly in the Services.
	maxBlame = 8
	// maxSearch is how many tries of one search may fail. What it has not come
	// to is still due, and the next search goes on there.
	maxSearch = 1000
)

// search writes Service ports in ever smaller parts, to find those that fail
// alone while all others go in.
type search struct {
	loop    *familyLoop
	proven  bool // something went in: the kernel takes what is right
	refused map[ServicePortName]error
	failed  int // tries
}

// isolate writes what can be written of names and sets the rest aside. Where
// nothing goes in, the Services are not to blame: everything is written anew
// at the next try.
func (f *familyLoop) isolate(ctx context.Context, names []ServicePortName, proven bool) error {
	s := search{loop: f, refused: map[ServicePortName]error{}}
	s.proven = proven || !slices.ContainsFunc(names, func(n ServicePortName) bool { return !f.aside[n].proven })
	parts := f.parts(names)
	s.write(ctx, parts)
	switch {
	case ctx.Err() != nil:
		return f.failed(ctx, ctx.Err())
	case !s.proven && len(parts) > 1:
		f.all = true
		return f.failed(ctx, fmt.Errorf("whichever Services it holds: %w", errors.Join(slices.Collect(maps.Values(s.refused))...)))
	}
	for _, name := range slices.SortedFunc(maps.Keys(s.refused), ServicePortName.Compare) {
		f.setAside(name, s.refused[name], s.proven)
	}
	if f.all && s.proven {
		// The last part left the kernel's state unknown; the others need it.
		if err := f.try(ctx, f.planner.asWritten(nil), Change{All: true}); err != nil {
			return f.failed(ctx, err)
		}
	}
	return f.refusals()
}

// write tries parts as one, then by halves.
func (s *search) write(ctx context.Context, parts [][]ServicePortName) {
	if len(parts) == 0 || ctx.Err() != nil || s.over() {
		return
	}
	names := slices.Concat(parts...)
	err := s.loop.tryPart(ctx, names)
	if err == nil {
		s.proven = true
		s.loop.done(names)
		return
	}
	s.failed++
	if len(parts) == 1 {
		for _, name := range names {
			s.refused[name] = err
		}
		return
	}
	half := len(parts) / 2
	s.write(ctx, parts[:half])
	s.write(ctx, parts[half:])
}

func (s *search) over() bool {
	return !s.proven && len(s.refused) > maxBlame || s.failed >= maxSearch
}

// tryPart writes some of what changed. Where the kernel's state is unknown
// that takes writing everything which the kernel took before as well.
func (f *familyLoop) tryPart(ctx context.Context, names []ServicePortName) error {
	if f.all {
		return f.try(ctx, f.planner.asWritten(names), Change{All: true})
	}
	return f.try(ctx, f.planner.plan, Change{Services: names})
}

// setAside leaves a Service port out of further syncs. One that failed alone,
// with nothing beside it that went in, may only have been the first to meet a
// kernel state that somebody else changed: then everything is written anew.
func (f *familyLoop) setAside(name ServicePortName, err error, proven bool) {
	port := f.planner.plan.Services[name]
	before, again := f.aside[name]
	f.aside[name] = refusal{port, err, proven}
	f.all = f.all || !proven
	if again && before.port == port && before.err.Error() == err.Error() {
		return // reported when it was new
	}
	f.opts.Report(Problem{
		Kind: "Service", Object: name.ServiceName.String(), Field: fmt.Sprintf("port %q", name.Port),
		Reason: fmt.Sprintf("%s rules could not be written: %v; what was served there before still is, and it is tried again", f.family, err),
	})
}

// refusals is the error of a sync that had to leave Service ports out.
func (f *familyLoop) refusals() error {
	var failed []error
	for _, name := range slices.SortedFunc(maps.Keys(f.aside), ServicePortName.Compare) {
		failed = append(failed, fmt.Errorf("Service %s: %w", name, f.aside[name].err))
	}
	return errors.Join(failed...)
}

// parts are the Service ports among which the ones to blame are looked for.
// Those between which a frontend changes hands can only be written together.
// New ones come before those that were refused before.
func (f *familyLoop) parts(names []ServicePortName) [][]ServicePortName {
	linked := newLinks(f.planner)
	byRoot := map[ServicePortName][]ServicePortName{}
	for _, name := range f.changed() {
		root := linked.root(name)
		byRoot[root] = append(byRoot[root], name)
	}
	var fresh, old [][]ServicePortName
	for _, name := range names {
		root := linked.root(name)
		part := byRoot[root]
		if part == nil {
			continue // it came with another
		}
		delete(byRoot, root)
		if slices.ContainsFunc(part, func(n ServicePortName) bool { _, refused := f.aside[n]; return refused }) {
			old = append(old, part)
		} else {
			fresh = append(fresh, part)
		}
	}
	return append(fresh, old...)
}

// links joins changed Service ports into sets; each points towards the root of
// its set.
type links map[ServicePortName]ServicePortName

func newLinks(p *planner) links {
	l := links{}
	for name, was := range p.changed {
		for _, key := range was.keys() {
			heir := p.claims.owners[key].by
			if _, changed := p.changed[heir]; changed && heir != name {
				l.join(name, heir)
			}
		}
	}
	return l
}

func (l links) root(name ServicePortName) ServicePortName {
	for {
		next, ok := l[name]
		if !ok {
			return name
		}
		if far, ok := l[next]; ok {
			l[name] = far // the next walk is shorter
		}
		name = next
	}
}

func (l links) join(a, b ServicePortName) {
	if a, b = l.root(a), l.root(b); a != b {
		l[a] = b
	}
}
