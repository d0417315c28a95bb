// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"signalbox/config"
	"signalbox/modes"
	"signalbox/node"
)

// tune sets the OOM score and the kernel settings that the configuration asks for. It
// returns the settings that cannot be written, and the node is served all the same:
// kube-proxy would not start. The log alone names the score: no packet depends on it.
func tune(cfg *config.Config, log *slog.Logger) []*node.KernelProblem {
	if cfg.OOMScoreAdj != nil {
		if p := node.SetOOMScore(*cfg.OOMScoreAdj); p != nil {
			log.Warn(p.Impact, "error", p, "remedy", p.Remedy())
		}
	}
	return node.TuneConntrack(cfg.Conntrack)
}

// Init does what needs all privileges and ends (--init-only). It returns every failure of
// the mode. The node can be served without a setting of connection tracking, and the
// daemon reports it: Init logs that only.
func Init(cfg *config.Config, log *slog.Logger) error {
	for _, p := range node.TuneConntrack(cfg.Conntrack) {
		log.Warn(p.Impact, "error", p, "remedy", p.Remedy())
	}
	choice, err := modes.Choose(cfg.Mode, usableFamilies(log))
	failed := []error{err}
	for _, family := range choice.Families {
		settings := cfg.ForMode(choice.Mode)
		if err := choice.Mode.Init(cfg.Options(choice.Mode, family), settings.ServesLocalhost(family)); err != nil {
			failed = append(failed, fmt.Errorf("mode %s, %s: %w", choice.Mode.Name(), family, err))
		}
	}
	return errors.Join(failed...)
}

// gcPercent is for a daemon that runs on every node and does nothing between changes:
// it should save memory, not garbage collection.
const gcPercent = 50

// tuneGC collects garbage sooner than Go would, unless GOGC is set.
func tuneGC() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
}

// returnMemory returns memory to the kernel. The first lists of objects and the first
// transaction need more than any later ones.
func returnMemory() { debug.FreeOSMemory() }
