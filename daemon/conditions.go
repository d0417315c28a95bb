package daemon

import (
	"slices"
	"sync"
)

// The subjects of conditions, in the order in which they are listed.
const (
	nodeName = iota
	manifests
	routeSources
	subjects // their number
)

// conditions are the faults with which the daemon serves on: a manifest that cannot be
// used, a Node object that is missing, routes whose source is not used. Health and
// `signalbox ready` list them; no status follows from them.
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
