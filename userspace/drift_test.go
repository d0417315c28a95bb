// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/internal/nstest"
	"signalbox/nft/nfttest"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// TestRepair: what another program changes in the table is reported and named, and a full
// write repairs it. Frontends keep their numbers. Own changes are not reported.
func TestRepair(t *testing.T) {
	for _, test := range []struct{ damage, found string }{
		{"flush map ip signalbox-userspace frontends", "set frontends lacks 2 elements"},
		{"flush chain ip signalbox-userspace nat-prerouting", "chain nat-prerouting has 0 rules instead of 1"},
		{"insert rule ip signalbox-userspace services drop", "chain services has "},
		{"flush chain ip signalbox-userspace nat-prerouting; add rule ip signalbox-userspace nat-prerouting accept", "chain nat-prerouting has another rule, with handle "},
		{"delete table ip signalbox-userspace", "the table is missing"},
		{"flush ruleset", "the table is missing"},
	} {
		t.Run(test.damage, func(t *testing.T) {
			w := newWorld(t, plan.IPv4)
			ctx, cancel := context.WithCancel(t.Context())
			drifted, done := make(chan proxier.Writer), make(chan struct{})
			go func() {
				defer close(done)
				w.p.Watch(ctx, func(w proxier.Writer) {
					select {
					case drifted <- w:
					case <-ctx.Done():
					}
				})
			}()
			defer func() { cancel(); <-done }()
			listing := func() string {
				text, err := nfttest.Listing()
				w.must(err)
				return text
			}
			if _, err := w.p.Compare(t.Context()); !errors.Is(err, proxier.ErrNothingWritten) {
				t.Errorf("before the first write, Compare says %v", err)
			}
			w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
			w.serve(0, 0, 0, 1)
			intact := listing()
			if found, err := w.p.Repair(t.Context()); err != nil || len(found.Objects) > 0 {
				t.Errorf("before the damage: found %+v, %v", found, err)
			}
			nstest.NFT(t, test.damage, "-f", "-")
			if by := <-drifted; by.Name != "nft" {
				t.Errorf("reported by %s", by)
			}
			if c, err := w.p.Compare(t.Context()); err != nil || len(c.Differences) == 0 {
				t.Errorf("Compare finds %+v, %v", c, err)
			}
			for name := range w.plan.Services {
				if c, err := w.p.Compare(t.Context(), name); err != nil || len(c.Differences)+len(c.Holds) == 0 {
					t.Errorf("about %s, Compare finds %+v, %v", name, c, err)
				}
			}
			found, err := w.p.Repair(t.Context())
			if err != nil || len(found.Objects) == 0 || !strings.HasPrefix(found.Objects[0], test.found) || !found.NeedsFullWrite {
				t.Errorf("found %+v, %v, want %q", found, err, test.found)
			}
			w.must(w.p.Sync(t.Context(), w.plan, plan.Change{All: true}))
			if diff := cmp.Diff(intact, listing()); diff != "" {
				t.Errorf("the repair makes another table (-before +after)\n%s", diff)
			}
		})
	}
}
