package daemon

import (
	"context"
	"errors"
	"log/slog"

	"signalbox/internal/handover"
)

// tellManager tells the service manager, where there is one, when all families
// are served. By then all sockets that are of use have been taken from what an
// earlier process has left.
func tellManager(ctx context.Context, all *served, sockets *handover.Sockets, log *slog.Logger) {
	if !all.wait(ctx) {
		return
	}
	if err := errors.Join(handover.Ready(), sockets.CloseRest()); err != nil {
		log.Warn("the service manager cannot be told that Services are served", "error", err)
	}
}

// tellManagerOfEnd tells it that this process ends, and not only one
// configuration.
func tellManagerOfEnd(log *slog.Logger) {
	if err := handover.Stopping(); err != nil {
		log.Warn("the service manager cannot be told that this process ends", "error", err)
	}
}
