package userspace

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/proxier"
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

// limits are how many connections and flows the relays that share them keep
// open between them.
type limits struct {
	connections, flows quota
}

// limitsFor shares out files: three quarters for connections, the rest for
// flows.
func limitsFor(files uint64) *limits {
	free := int64(max(files, filesKept+64) - filesKept)
	return &limits{connections: quota{most: free * 3 / 4 / filesPerConnection}, flows: quota{most: free / 4 / filesPerFlow}}
}

// processLimits are those of all relays of this process: of both families, and
// where the masquerade bit has changed of the relays that lead their last
// connections to an end, too.
var processLimits = sync.OnceValues(func() (*limits, error) {
	files, err := raiseFileLimit()
	if err != nil {
		return nil, err
	}
	return limitsFor(files), nil
})

// quota is how many may be open, and how many are.
type quota struct {
	most int64
	open atomic.Int64
}

// enter counts one more, here and in n, one relay's own count, unless there are
// as many as there may be.
func (q *quota) enter(n *atomic.Int64) bool {
	if q.open.Add(1) > q.most {
		q.open.Add(-1)
		return false
	}
	n.Add(1)
	return true
}

func (q *quota) leave(n *atomic.Int64) {
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

// Stats are counts of what a relay did and does, and its limits. All but those
// and Connections and Flows only grow.
type Stats struct {
	// Connections and Flows are open now.
	Connections, Flows int64
	// MaxConnections and MaxFlows may be open, in all relays of the process
	// together: see Refused.
	MaxConnections, MaxFlows int64
	// Accepted counts relayed TCP connections, FlowsMade UDP flows.
	Accepted, FlowsMade uint64
	// DialFailures counts attempts to reach an endpoint that failed,
	// NoEndpoint connections and datagrams that no endpoint could be found for.
	DialFailures, NoEndpoint uint64
	// Refused counts connections and datagrams that found as many connections
	// or flows open as there may be, with those of other relays.
	Refused uint64
	// AcceptFailures counts failed accepts, for want of file descriptors most
	// likely.
	AcceptFailures uint64
	// Lost counts datagrams, of clients and answers, that found no room on this
	// node, because a device was slow or the relay, or that a packet filter
	// forbade to send.
	Lost uint64
	// Transparent counts connections and flows that bear their client's
	// address.
	Transparent uint64
}

// counters are Stats as they are counted.
type counters struct {
	connections, flows                                                                        atomic.Int64
	accepted, flowsMade, dialFailures, noEndpoint, refused, acceptFailures, lost, transparent atomic.Uint64
}

func (c *counters) stats(most *limits) Stats {
	return Stats{
		Connections: c.connections.Load(), Flows: c.flows.Load(),
		MaxConnections: most.connections.most, MaxFlows: most.flows.most,
		Accepted: c.accepted.Load(), FlowsMade: c.flowsMade.Load(),
		DialFailures: c.dialFailures.Load(), NoEndpoint: c.noEndpoint.Load(),
		Refused: c.refused.Load(), AcceptFailures: c.acceptFailures.Load(), Lost: c.lost.Load(), Transparent: c.transparent.Load(),
	}
}

// quietLog says the same thing of the same Service port at most once in a while.
type quietLog struct {
	mu   sync.Mutex
	last map[remark]time.Time
}

// remark is what is said, and of whom; of nobody in particular with the zero
// name.
type remark struct {
	message string
	service proxier.ServicePortName
}

const (
	quiet = 10 * time.Second
	// maxRemarks bounds what is said in that time.
	maxRemarks = 256
)

func (q *quietLog) warn(message string, args ...any) {
	if q.fresh(remark{message: message}, time.Now()) {
		slog.Warn("userspace: "+message, args...)
	}
}

// warnOf is warn about a Service port.
func (q *quietLog) warnOf(service proxier.ServicePortName, message string, args ...any) {
	if q.fresh(remark{message, service}, time.Now()) {
		slog.Warn("userspace: "+message, append([]any{"service", service.String()}, args...)...)
	}
}

// fresh notes that something is said; false if it was just now, or if too much
// was.
func (q *quietLog) fresh(r remark, now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last, said := q.last[r]; said && now.Sub(last) < quiet {
		return false
	}
	if len(q.last) >= maxRemarks {
		maps.DeleteFunc(q.last, func(_ remark, last time.Time) bool { return now.Sub(last) >= quiet })
	}
	if len(q.last) >= maxRemarks {
		return false
	}
	if q.last == nil {
		q.last = map[remark]time.Time{}
	}
	q.last[r] = now
	return true
}
