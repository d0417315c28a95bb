package apiserver

import (
	"sync"

	"k8s.io/apimachinery/pkg/runtime"

	"signalbox/proxier"
)

// gate passes calls on to a sink until it is shut.
type gate struct {
	sink proxier.Sink
	mu   sync.RWMutex
	gone bool
}

var _ proxier.Sink = (*gate)(nil)

// Apply implements proxier.Sink.
func (g *gate) Apply(o runtime.Object) { g.pass(func() { g.sink.Apply(o) }) }

// Delete implements proxier.Sink.
func (g *gate) Delete(o runtime.Object) { g.pass(func() { g.sink.Delete(o) }) }

// Synced implements proxier.Sink.
func (g *gate) Synced() { g.pass(g.sink.Synced) }

func (g *gate) pass(call func()) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if !g.gone {
		call()
	}
}

// shut waits for the calls under way; later ones come to nothing.
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone = true
}
