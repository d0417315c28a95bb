// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"log/slog"
	"strings"
	"testing"
)

// TestLogFollowsTheConfiguration: a logger with attributes, as the Kubernetes client
// libraries have one, writes to the log of the configuration in force.
func TestLogFollowsTheConfiguration(t *testing.T) {
	h := newSwappableHandler(slog.New(slog.DiscardHandler))
	log := slog.New(h).With("from", "client-go").WithGroup("watch")
	var text strings.Builder
	h.set(slog.New(slog.NewTextHandler(&text, nil)))
	log.Info("ended", "resource", "nodes")
	if want := "msg=ended from=client-go watch.resource=nodes\n"; !strings.HasSuffix(text.String(), want) {
		t.Errorf("the log has %q, want %q at its end", &text, want)
	}
}
