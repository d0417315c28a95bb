package daemon

import (
	"os"
	"runtime/debug"
)

// A daemon on every node of a cluster is paid for in memory, not in garbage
// collection: between changes it does nothing at all.
const gcPercent = 50

// spareMemory collects garbage sooner than Go would, unless GOGC says when.
func spareMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// returnMemory gives back what only the start needed: the first lists of
// objects and the first transaction are larger than any that follow.
func returnMemory() { debug.FreeOSMemory() }
