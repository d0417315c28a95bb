package file

import (
	"cmp"
	"log/slog"
	"slices"

	"signalbox/proxier"
)

// catalog knows which file holds which object, and what the sink was told. It
// keeps no object beyond the telling: the sink has them.
type catalog struct {
	log   *slog.Logger
	files map[string]map[key]uint64 // fingerprints, by file name
	held  map[key][]string          // names of the files that hold an object, sorted
	told  map[key]uint64            // fingerprint of what the sink was told
}

func newCatalog(log *slog.Logger) *catalog {
	return &catalog{log: log, files: map[string]map[key]uint64{}, held: map[key][]string{}, told: map[key]uint64{}}
}

// set takes what a file holds now and returns the objects that this concerns.
// Where some of the file could not be read, what it held before stays.
func (c *catalog) set(name string, found map[key]manifest, broken bool) []key {
	before := c.files[name]
	now := make(map[key]uint64, len(found))
	for k, m := range found {
		now[k] = m.text
	}
	if broken {
		for k, text := range before {
			if _, named := now[k]; !named {
				now[k] = text
			}
		}
	}
	if len(now) == 0 {
		delete(c.files, name)
	} else {
		c.files[name] = now
	}
	var concerned []key
	for k, text := range now {
		if old, had := before[k]; had && old == text {
			continue
		}
		concerned = append(concerned, k)
		c.hold(k, name)
	}
	for k := range before {
		if _, has := now[k]; !has {
			concerned = append(concerned, k)
			c.letGo(k, name)
		}
	}
	return concerned
}

func (c *catalog) hold(k key, name string) {
	i, there := slices.BinarySearch(c.held[k], name)
	if there {
		return
	}
	c.held[k] = slices.Insert(c.held[k], i, name)
	if len(c.held[k]) > 1 {
		c.log.Warn("two files hold the same object; the first by name counts", "object", k.String(), "files", c.held[k])
	}
}

func (c *catalog) letGo(k key, name string) {
	c.held[k] = slices.DeleteFunc(c.held[k], func(n string) bool { return n == name })
	if len(c.held[k]) == 0 {
		delete(c.held, k)
	}
}

// tell brings the sink up to date with the concerned objects, in a fixed
// order. fetch finds an object's present form in the file that holds it.
func (c *catalog) tell(concerned []key, fetch func(file string, k key) object, sink proxier.Sink) {
	slices.SortFunc(concerned, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	})
	for _, k := range slices.Compact(concerned) {
		told, was := c.told[k]
		holders := c.held[k]
		if len(holders) == 0 {
			if was {
				delete(c.told, k)
				gone := kinds[k.kind].empty()
				gone.SetNamespace(k.namespace)
				gone.SetName(k.name)
				sink.Delete(gone)
			}
			continue
		}
		text := c.files[holders[0]][k]
		if was && told == text {
			continue
		}
		if obj := fetch(holders[0], k); obj != nil {
			c.told[k] = text
			sink.Apply(obj)
		}
	}
}
