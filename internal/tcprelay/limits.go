// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"signalbox/node"
)

// File descriptors of a relayed connection (two sockets, and for splice a pipe of
// two in each direction) and of a UDP flow.
const (
	filesPerConnection = 6
	filesPerFlow       = 1
	// filesKept are for the rest of the process.
	filesKept = 1024
	// wantedFiles is the limit that the relay asks for.
	wantedFiles = 1 << 20
)

// Limits are for connections and UDP flows of all relays that share them.
type Limits struct {
	Connections, Flows Limit
}

// limitsFor gives three quarters of the files to connections, the rest to flows.
func limitsFor(files uint64) *Limits {
	free := int64(max(files, filesKept+64) - filesKept)
	return &Limits{Connections: Limit{Max: free * 3 / 4 / filesPerConnection}, Flows: Limit{Max: free / 4 / filesPerFlow}}
}

// ProcessLimits are for all relays of this process: of both families, and also of
// those that only drain after a change of the masquerade bit.
var ProcessLimits = sync.OnceValues(func() (*Limits, error) {
	files, err := raiseFileLimit()
	if err != nil {
		return nil, err
	}
	return limitsFor(files), nil
})

// Limit is a semaphore that does not block.
type Limit struct {
	Max int64
	// Within is a limit that also applies; may be nil.
	Within *Limit
	open   atomic.Int64
}

// Acquire counts one more, here and in n, the relay's own count; false at the limit.
func (l *Limit) Acquire(n *atomic.Int64) bool {
	if l.open.Add(1) > l.Max || l.Within != nil && !l.Within.Acquire(n) {
		l.open.Add(-1)
		return false
	}
	if l.Within == nil {
		n.Add(1)
	}
	return true
}

// Release undoes an Acquire.
func (l *Limit) Release(n *atomic.Int64) {
	l.open.Add(-1)
	if l.Within != nil {
		l.Within.Release(n)
		return
	}
	n.Add(-1)
}

// raiseFileLimit raises RLIMIT_NOFILE to wantedFiles or as far as possible, and
// returns the new limit.
func raiseFileLimit() (uint64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	most := uint64(wantedFiles)
	files, _ := node.Sysctl("fs/nr_open")
	if n, err := strconv.ParseUint(files, 10, 64); err == nil {
		most = min(most, n)
	}
	if r.Cur >= most {
		return r.Cur, nil
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: max(most, r.Max)}); err == nil {
		return most, nil
	}
	// Without the right to raise the hard limit, the soft one goes up to it.
	if r.Cur < r.Max && unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: r.Max, Max: r.Max}) == nil {
		return r.Max, nil
	}
	return r.Cur, nil
}
