// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"runtime"
	"testing"
	"time"

	"signalbox/proxier/plan"
)

// TestLookDuringWrite: a look at the changes of the rules, which waits for a write, does not
// stop this write.
func TestLookDuringWrite(t *testing.T) {
	eachVariant(t, func(t *testing.T, p *Proxier) {
		desired := newWorld(p.opts.Family, 3).plan(3)
		mustSync(t, p, desired, plan.Change{All: true})
		stuck := time.AfterFunc(20*time.Second, func() { panic("the write does not end") })
		defer stuck.Stop()
		if err := p.tools.Unobserved(func() error {
			ended := make(chan struct{})
			go func() {
				p.observe()
				close(ended)
			}()
			for waits := false; !waits; { // until the look waits with mu, or has ended
				select {
				case <-ended:
					waits = true
				default:
					if waits = !p.mu.TryLock(); !waits {
						p.mu.Unlock()
						runtime.Gosched()
					}
				}
			}
			return p.prepareNode(&desired.Node)
		}); err != nil {
			t.Error(err)
		}
	})
}
