package syncer

import (
	"signalbox/proxier/plan"
)

import "slices"

// links joins Service ports that are only written together: each points towards
// the root of its set.
type links map[plan.ServicePortName]plan.ServicePortName

// newLinks joins the changed Service ports between which a frontend changes
// hands.
func newLinks(p *planner) links {
	l := links{}
	for name, was := range p.changed {
		if was == nil {
			continue
		}
		for i := range was.Frontends {
			heir := p.owners.owners[was.Frontends[i].Key(name.Protocol)].by
			if _, changed := p.changed[heir]; changed && heir != name {
				l.join(name, heir)
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

// close adds to names the changed Service ports that are joined to them.
func (l links) close(p *planner, names []plan.ServicePortName) []plan.ServicePortName {
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
