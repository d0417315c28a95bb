// SPDX-License-Identifier: Apache-2.0

package file

import (
	"cmp"
	"log/slog"
	"slices"

	"signalbox/proxier/service"
)

// catalog knows which files have which objects, and what the sink has. It keeps
// fingerprints, not objects: the sink has these.
type catalog struct {
	log     *slog.Logger
	files   map[string]map[key]uint64 // fingerprints, by file name
	holders map[key][]string          // sorted names of the files that have an object
	sent    map[key]uint64            // fingerprint of what the sink has
}

func newCatalog(log *slog.Logger) *catalog {
	return &catalog{log: log, files: map[string]map[key]uint64{}, holders: map[key][]string{}, sent: map[key]uint64{}}
}

// set replaces the objects of a file and returns the keys that this changes.
// Objects that an incomplete file had before stay.
func (c *catalog) set(name string, objects map[key]manifest, incomplete bool) (changed []key) {
	before := c.files[name]
	now := make(map[key]uint64, len(objects))
	for k, m := range objects {
		now[k] = m.fingerprint
	}
	for k, fingerprint := range before {
		switch _, has := now[k]; {
		case has:
		case incomplete:
			now[k] = fingerprint
		default:
			changed = append(changed, k)
			c.removeHolder(k, name)
		}
	}
	for k, fingerprint := range now {
		if old, had := before[k]; !had || old != fingerprint {
			changed = append(changed, k)
			c.addHolder(k, name)
		}
	}
	c.files[name] = now
	if len(now) == 0 {
		delete(c.files, name)
	}
	return changed
}

func (c *catalog) addHolder(k key, name string) {
	i, there := slices.BinarySearch(c.holders[k], name)
	if there {
		return
	}
	c.holders[k] = slices.Insert(c.holders[k], i, name)
	if len(c.holders[k]) > 1 {
		c.log.Warn("several files have the same object; the first by name counts", "object", k.String(), "files", c.holders[k])
	}
}

func (c *catalog) removeHolder(k key, name string) {
	c.holders[k] = slices.DeleteFunc(c.holders[k], func(n string) bool { return n == name })
	if len(c.holders[k]) == 0 {
		delete(c.holders, k)
	}
}

// send sends the changed objects to the sink, in a fixed order. load returns an
// object of a file, or nil. send returns the objects that could not be loaded.
func (c *catalog) send(changed []key, load func(file string, k key) object, sink service.Sink) (unsent []key) {
	slices.SortFunc(changed, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	})
	for _, k := range slices.Compact(changed) {
		sent, known := c.sent[k]
		if len(c.holders[k]) == 0 {
			if known {
				delete(c.sent, k)
				gone := kinds[k.kind].empty()
				gone.SetNamespace(k.namespace)
				gone.SetName(k.name)
				sink.Delete(gone)
			}
			continue
		}
		file := c.holders[k][0]
		fingerprint := c.files[file][k]
		if known && sent == fingerprint {
			continue
		}
		obj := load(file, k)
		if obj == nil {
			unsent = append(unsent, k)
			continue
		}
		c.sent[k] = fingerprint
		sink.Apply(obj)
	}
	return unsent
}
