package daemon

import (
	"os"
	"runtime/debug"
)

// gcPercent is for a daemon that runs on every node and does nothing between changes:
// it should save memory, not garbage collection.
const gcPercent = 50

// tuneGC collects garbage sooner than Go would, unless GOGC is set.
func tuneGC() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// returnMemory returns memory to the kernel. The first lists of objects and the first
// transaction need more than any later ones.
func returnMemory() { debug.FreeOSMemory() }
