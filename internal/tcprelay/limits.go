package tcprelay

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// What a relayed connection and a UDP flow cost in file descriptors: two
// sockets and, while bytes wait in the kernel on their way, a pipe in each
// direction.
const (
	filesPerConnection = 6
	filesPerFlow       = 1
	// filesKept are for everything else in the process.
	filesKept = 1024
	// wantedFiles is how many files the relay asks to be allowed.
	wantedFiles = 1 << 20
)

// Limits are how many connections and flows the relays that share them keep
// open between them.
type Limits struct {
	Connections, Flows Quota
}

// limitsFor shares out files: three quarters for connections, the rest for
// flows.
func limitsFor(files uint64) *Limits {
	free := int64(max(files, filesKept+64) - filesKept)
	return &Limits{Connections: Quota{Most: free * 3 / 4 / filesPerConnection}, Flows: Quota{Most: free / 4 / filesPerFlow}}
}

// ProcessLimits are those of all relays of this process: of both families, and
// where the masquerade bit has changed of the relays that lead their last
// connections to an end, too.
var ProcessLimits = sync.OnceValues(func() (*Limits, error) {
	files, err := raiseFileLimit()
	if err != nil {
		return nil, err
	}
	return limitsFor(files), nil
})

// Quota is how many may be open, and how many are.
type Quota struct {
	Most int64
	open atomic.Int64
}

// Enter counts one more, here and in n, one relay's own count, unless there are
// as many as there may be.
func (q *Quota) Enter(n *atomic.Int64) bool {
	if q.open.Add(1) > q.Most {
		q.open.Add(-1)
		return false
	}
	n.Add(1)
	return true
}

// Leave takes back an Enter.
func (q *Quota) Leave(n *atomic.Int64) {
	n.Add(-1)
	q.open.Add(-1)
}

// raiseFileLimit raises RLIMIT_NOFILE as far as wanted and possible, and
// returns what it is then.
func raiseFileLimit() (uint64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	most := uint64(wantedFiles)
	if text, err := os.ReadFile("/proc/sys/fs/nr_open"); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err == nil {
			most = min(most, n)
		}
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
