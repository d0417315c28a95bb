// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"cmp"
	"slices"

	"signalbox/proxier/plan"
)

const (
	// smallService is the largest number of changed entries with which a Service is
	// written together with other Services.
	smallService = 512
	// sliceEntries is how many entries of a larger Service are written at once.
	// The slowest mode takes some tenths of a second for them.
	sliceEntries = 4096
)

// backlog has the changes that are due, by the way they are written. Suspects of a
// search are not in it.
type backlog struct {
	// small are the changes of small Services. One sync writes all of them,
	// before anything else.
	small []plan.ServicePortName
	// slices are changes of large Services, and changes of quarantined Services
	// that the kernel never refused. A slice has one Service and what is linked to it.
	slices [][]plan.ServicePortName
	// altered are quarantined Service ports that have changed since the kernel
	// refused them.
	altered [][]plan.ServicePortName
}

func (b *backlog) empty() bool { return len(b.small)+len(b.slices)+len(b.altered) == 0 }

// lane is the way in which a Service port is written. Linked Service ports use the
// highest of their lanes.
type lane uint8

const (
	laneSmall lane = iota
	laneSlices
	laneSuspects
	laneQuarantined
	laneAltered
)

// backlog sorts the changes.
func (f *familyLoop) backlog() (b backlog) {
	names := f.changed()
	entries := map[plan.ServiceName]int{}
	for _, name := range names {
		if _, refused := f.quarantinedPorts[name]; !refused {
			entries[name.ServiceName] += f.entries(name)
		}
	}
	lanes := f.lanes(names, entries)
	if !slices.ContainsFunc(lanes, func(l lane) bool { return l != laneSmall }) {
		return backlog{small: names}
	}
	return f.sort(names, lanes, entries)
}

// lanes returns the lane of each name.
func (f *familyLoop) lanes(names []plan.ServicePortName, entries map[plan.ServiceName]int) []lane {
	suspects := map[plan.ServiceName]struct{}{}
	for _, group := range f.suspects {
		for _, name := range group {
			suspects[name.ServiceName] = struct{}{}
		}
	}
	lanes := make([]lane, len(names))
	for i, name := range names {
		r, refused := f.quarantinedPorts[name]
		_, suspected := suspects[name.ServiceName]
		switch {
		case refused && r.port != f.planner.plan.Services[name]:
			lanes[i] = laneAltered
		case refused:
			lanes[i] = laneQuarantined
		case suspected:
			lanes[i] = laneSuspects
		case entries[name.ServiceName] > smallService || f.portCounts[name.ServiceName] > 0:
			lanes[i] = laneSlices
		}
	}
	return lanes
}

// sort puts linked Service ports into one lane. A quarantined Service port with a new
// link is another change than the one that the kernel refused.
func (f *familyLoop) sort(names []plan.ServicePortName, lanes []lane, entries map[plan.ServiceName]int) (b backlog) {
	of := make(map[plan.ServicePortName]lane, len(names))
	for i, name := range names {
		of[name] = lanes[i]
	}
	byLane := map[lane][][]plan.ServicePortName{}
	for _, part := range newLinks(f.planner).parts(names) {
		highest, lowest := of[part[0]], of[part[0]]
		for _, name := range part[1:] {
			highest, lowest = max(highest, of[name]), min(lowest, of[name])
		}
		if highest == laneQuarantined && lowest != laneQuarantined {
			highest = laneAltered
		}
		byLane[highest] = append(byLane[highest], part)
	}
	b.small = slices.Concat(byLane[laneSmall]...)
	large := byLane[laneSlices]
	slices.SortStableFunc(large, func(x, y []plan.ServicePortName) int {
		return cmp.Or(cmp.Compare(entries[x[0].ServiceName], entries[y[0].ServiceName]), x[0].ServiceName.Compare(y[0].ServiceName))
	})
	b.slices, b.altered = f.pack(large), f.pack(byLane[laneAltered])
	return b
}

// pack joins successive parts of one Service into slices.
func (f *familyLoop) pack(parts [][]plan.ServicePortName) (packed [][]plan.ServicePortName) {
	room := 0
	for _, part := range parts {
		last, size := len(packed)-1, f.entries(part...)
		if last >= 0 && packed[last][0].ServiceName == part[0].ServiceName && size <= room {
			packed[last] = append(packed[last], part...)
			room -= size
			continue
		}
		packed = append(packed, slices.Clone(part))
		room = sliceEntries - size
	}
	return packed
}

// entries is the number of entries that a mode writes for changed Service ports.
func (f *familyLoop) entries(names ...plan.ServicePortName) (n int) {
	for _, name := range names {
		n += max(1, entriesOf(f.planner.changed[name]), entriesOf(f.planner.plan.Services[name]))
	}
	return n
}

// entriesOf counts the frontends of a Service port, their source ranges and its
// endpoints.
func entriesOf(p *plan.ServicePort) int {
	if p == nil {
		return 0
	}
	n := len(p.Frontends) + p.Usable.Len()
	for i := range p.Frontends {
		n += len(p.Frontends[i].Sources)
	}
	return n
}

// links joins Service ports that are only written together: each points towards
// the root of its set.
type links map[plan.ServicePortName]plan.ServicePortName

// newLinks joins the changed Service ports between which a frontend moves.
func newLinks(p *planner) links {
	l := links{}
	for name, was := range p.changed {
		if was == nil {
			continue
		}
		for i := range was.Frontends {
			newOwner := p.ownership.owners[was.Frontends[i].Key(name.Protocol)].by
			if _, changed := p.changed[newOwner]; changed && newOwner != name {
				l.join(name, newOwner)
			}
		}
	}
	return l
}

func (l links) root(name plan.ServicePortName) plan.ServicePortName {
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

func (l links) join(a, b plan.ServicePortName) {
	if a, b = l.root(a), l.root(b); a != b {
		l[a] = b
	}
}

// parts divides names into those that are joined, in the order of names.
func (l links) parts(names []plan.ServicePortName) [][]plan.ServicePortName {
	index := make(map[plan.ServicePortName]int, len(names))
	var parts [][]plan.ServicePortName
	for _, name := range names {
		root := l.root(name)
		i, known := index[root]
		if !known {
			i = len(parts)
			index[root] = i
			parts = append(parts, nil)
		}
		parts[i] = append(parts[i], name)
	}
	return parts
}

// services divides names as parts does, but leaves each Service whole.
func (l links) services(names []plan.ServicePortName) [][]plan.ServicePortName {
	joined, first := links{}, map[plan.ServiceName]plan.ServicePortName{}
	for _, name := range names {
		if _, known := first[name.ServiceName]; !known {
			first[name.ServiceName] = name
		}
		joined.join(name, first[name.ServiceName])
		joined.join(name, l.root(name))
	}
	return joined.parts(names)
}

// addLinked adds to names the changed Service ports that are joined to them.
func (l links) addLinked(p *planner, names []plan.ServicePortName) []plan.ServicePortName {
	if len(l) == 0 {
		return names
	}
	roots, present := map[plan.ServicePortName]struct{}{}, map[plan.ServicePortName]struct{}{}
	for _, name := range names {
		roots[l.root(name)], present[name] = struct{}{}, struct{}{}
	}
	var more []plan.ServicePortName
	for name := range p.changed {
		_, joined := roots[l.root(name)]
		if _, has := present[name]; joined && !has {
			more = append(more, name)
		}
	}
	slices.SortFunc(more, plan.ServicePortName.Compare)
	return append(slices.Clone(names), more...)
}
