package daemon

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// swappableHandler is the log of what outlives a configuration. It writes as the
// configuration in force asks for.
type swappableHandler struct{ current atomic.Pointer[slog.Handler] }

var _ slog.Handler = (*swappableHandler)(nil)

func (h *swappableHandler) set(log *slog.Logger) {
	next := log.Handler()
	h.current.Store(&next)
}

// Enabled implements slog.Handler.
func (h *swappableHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return (*h.current.Load()).Enabled(ctx, level)
}

// Handle implements slog.Handler.
func (h *swappableHandler) Handle(ctx context.Context, r slog.Record) error {
	return (*h.current.Load()).Handle(ctx, r)
}

// WithAttrs implements slog.Handler, with the log of this moment.
func (h *swappableHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return (*h.current.Load()).WithAttrs(attrs)
}

// WithGroup implements slog.Handler, with the log of this moment.
func (h *swappableHandler) WithGroup(name string) slog.Handler {
	return (*h.current.Load()).WithGroup(name)
}
