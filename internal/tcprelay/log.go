package tcprelay

import (
	"log/slog"
	"maps"
	"sync"
	"time"

	"signalbox/proxier"
)

// Log says the same thing of the same Service port at most once in a while.
type Log struct {
	// Mode is what each line begins with.
	Mode string

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

// Warn logs a warning.
func (q *Log) Warn(message string, args ...any) {
	if q.fresh(remark{message: message}, time.Now()) {
		slog.Warn(q.Mode+": "+message, args...)
	}
}

// WarnOf is Warn about a Service port.
func (q *Log) WarnOf(service proxier.ServicePortName, message string, args ...any) {
	if q.fresh(remark{message, service}, time.Now()) {
		slog.Warn(q.Mode+": "+message, append([]any{"service", service.String()}, args...)...)
	}
}

// fresh notes that something is said; false if it was just now, or if too much
// was.
func (q *Log) fresh(r remark, now time.Time) bool {
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
