// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"log/slog"
	"maps"
	"sync"
	"time"

	"signalbox/proxier/plan"
)

// Log writes a message about the same Service port at most once in messageInterval.
type Log struct {
	// Mode is the prefix of each message.
	Mode string

	mu   sync.Mutex
	last map[messageKey]time.Time
}

// messageKey has the zero service where a message concerns no Service port.
type messageKey struct {
	text    string
	service plan.ServicePortName
}

const (
	messageInterval = 10 * time.Second
	// maxMessages bounds the messages in that time.
	maxMessages = 256
)

// Warn logs a warning.
func (q *Log) Warn(message string, args ...any) {
	if q.allow(messageKey{text: message}, time.Now()) {
		slog.Warn(q.Mode+": "+message, args...)
	}
}

// WarnOf is Warn about a Service port.
func (q *Log) WarnOf(service plan.ServicePortName, message string, args ...any) {
	if q.allow(messageKey{message, service}, time.Now()) {
		slog.Warn(q.Mode+": "+message, append([]any{"service", service.String()}, args...)...)
	}
}

// allow records a message; false if it is not to be logged.
func (q *Log) allow(k messageKey, now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last, ok := q.last[k]; ok && now.Sub(last) < messageInterval {
		return false
	}
	if len(q.last) >= maxMessages {
		maps.DeleteFunc(q.last, func(_ messageKey, last time.Time) bool { return now.Sub(last) >= messageInterval })
	}
	if len(q.last) >= maxMessages {
		return false
	}
	if q.last == nil {
		q.last = map[messageKey]time.Time{}
	}
	q.last[k] = now
	return true
}
