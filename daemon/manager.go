package daemon

import (
	"context"
	"log/slog"

	systemd "github.com/coreos/go-systemd/v22/daemon"
)

// notifyReady sends READY=1 to the service manager ($NOTIFY_SOCKET, see
// sd_notify(3)) when all families are served.
func notifyReady(ctx context.Context, all *initialSync, log *slog.Logger) {
	if all.wait(ctx) {
		notifyManager(systemd.SdNotifyReady, log)
	}
}

// notifyManager does nothing without a service manager.
func notifyManager(state string, log *slog.Logger) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Warn("the service manager gets no notification; with Type=notify it may end this process or wait for ever", "notification", state, "error", err)
	}
}
