package daemon

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// presentLog is the log of what outlives a configuration: it writes as the one
// in force asks for.
type presentLog struct{ now atomic.Pointer[slog.Handler] }

var _ slog.Handler = (*presentLog)(nil)

func (p *presentLog) set(log *slog.Logger) {
	h := log.Handler()
	p.now.Store(&h)
}

// Enabled implements slog.Handler.
func (p *presentLog) Enabled(ctx context.Context, level slog.Level) bool {
	return (*p.now.Load()).Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (p *presentLog) Handle(ctx context.Context, r slog.Record) error {
	return (*p.now.Load()).Handle(ctx, r)
}

// WithAttrs implements slog.Handler, with the log of this moment.
func (p *presentLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return (*p.now.Load()).WithAttrs(attrs)
}

// WithGroup implements slog.Handler, with the log of this moment.
func (p *presentLog) WithGroup(name string) slog.Handler { return (*p.now.Load()).WithGroup(name) }
