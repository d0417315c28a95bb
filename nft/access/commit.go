// SPDX-License-Identifier: Apache-2.0

package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"signalbox/internal/wait"
	"signalbox/nft"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Commit sends the changes of a table. If the kernel may not have what it had before,
// the error wraps proxier.ErrUnknownState too.
func Commit(t *nft.Table) error {
	err := t.Commit()
	if errors.Is(err, nft.ErrUnknownState) || errors.Is(err, nft.ErrTableChanged) {
		return fmt.Errorf("%w: %w", proxier.ErrUnknownState, err)
	}
	return err
}

// Watch learns when other software changes a mode's table.
type Watch struct {
	table *nft.Table
	// deaf: Run has yet to begin to listen.
	deaf bool
	// rules: other software wrote more than elements. A comparison does not see all of that:
	// the library does not read some attributes of chains and sets.
	rules atomic.Bool
}

// NewWatch begins to listen. If that fails, Run tries again.
func NewWatch(t *nft.Table) *Watch {
	err := t.Subscribe()
	if err != nil {
		slog.Warn("changes of the table by other software are not noticed yet; signalbox tries again each second", "family", t.Family.String(), "error", err)
	}
	return &Watch{table: t, deaf: err != nil}
}

// listenPause is the pause between two tries to listen.
const listenPause = time.Second

// Run implements Watch of proxier.Proxier.
func (w *Watch) Run(ctx context.Context, drifted func(proxier.Writer)) {
	for w.deaf {
		if !wait.For(ctx, listenPause) {
			return
		}
		if w.table.Subscribe() == nil {
			w.deaf = false
			drifted(proxier.Writer{}) // by changes that were not heard
		}
	}
	for {
		c, ok := w.table.NextChange(ctx)
		if !ok {
			return
		}
		if c.Rules {
			w.rules.Store(true)
		}
		drifted(proxier.Writer{Name: c.Process, PID: c.PID})
	}
}

// RulesChanged says whether other software wrote more than elements since the last call.
func (w *Watch) RulesChanged() bool { return w.rules.Swap(false) }

// Compare names what differs in the kernel from a mode's chains and elements. wanted
// hands out each element once.
func (w *Watch) Compare(chains []nft.Chain, wanted func(emit func(nft.Element))) ([]string, error) {
	contents, err := w.table.Inspect()
	if err != nil {
		return nil, err
	}
	found, err := w.CompareChains(contents, chains)
	if err != nil || len(found) > 0 {
		return found, err
	}
	elements, err := w.table.ReadElements()
	if err != nil {
		return nil, err
	}
	return w.table.Compare(elements, wanted).Texts(), nil
}

// Compare implements Compare of proxier.Proxier for a table. all hands out each element
// once, and of those of a Service port.
func Compare(t *nft.Table, chains []nft.Chain, all func(emit func(nft.Element)), about []plan.ServicePortName, of func(name plan.ServicePortName, emit func(nft.Element))) (c proxier.Comparison, err error) {
	wanted := all
	if len(about) > 0 {
		wanted = func(emit func(nft.Element)) {
			for _, name := range about {
				of(name, emit)
			}
		}
	}
	c.Differences, c.Holds, err = t.Differences(chains, wanted, len(about) > 0)
	return c, err
}

// CompareChains names the chains, sets and rules that differ.
func (w *Watch) CompareChains(contents *nft.Contents, chains []nft.Chain) ([]string, error) {
	found, err := w.table.CompareChains(contents, chains)
	if changed := w.RulesChanged(); err == nil && changed && len(found) == 0 {
		found = []string{"rules"}
	}
	return found, err
}
