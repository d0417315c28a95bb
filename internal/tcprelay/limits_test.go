// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"signalbox/proxier/plan"
)

func TestQuietLog(t *testing.T) {
	var q Log
	now := time.Now()
	of := func(n int) messageKey { return messageKey{"it fails", plan.ServicePortName{Port: fmt.Sprint(n)}} }
	if !q.allow(of(0), now) || q.allow(of(0), now.Add(messageInterval-1)) || !q.allow(of(1), now) {
		t.Error("something is not said once of each Service port")
	}
	for n := range 2 * maxMessages {
		q.allow(of(n), now)
	}
	if len(q.last) != maxMessages {
		t.Errorf("%d messages are recorded, want %d", len(q.last), maxMessages)
	}
	if !q.allow(of(0), now.Add(messageInterval)) || len(q.last) != 1 {
		t.Error("what was said long ago is not forgotten")
	}
}

func TestLimitsFor(t *testing.T) {
	for _, files := range []uint64{0, 256, 1024, 20000, 1 << 20} {
		l := limitsFor(files)
		used := l.Connections.Max*filesPerConnection + l.Flows.Max*filesPerFlow
		if l.Connections.Max < 1 || l.Flows.Max < 1 || files > 2*filesKept && used > int64(files-filesKept) {
			t.Errorf("%d files: %d connections and %d flows", files, l.Connections.Max, l.Flows.Max)
		}
	}
}

// However many relays a process has for a while, they have no more open than
// one.
func TestRelaysShareLimits(t *testing.T) {
	const files, relays = 20000, 4
	l := limitsFor(files)
	for name, q := range map[string]*Limit{"connections": &l.Connections, "flows": &l.Flows} {
		var open [relays]atomic.Int64
		full := int64(0)
		for q.Acquire(&open[full%relays]) {
			full++
		}
		if full != q.Max || q.Acquire(&open[1]) {
			t.Errorf("%d %s are open, want %d", full, name, q.Max)
		}
		before := open[1].Load()
		q.Release(&open[1])
		if open[1].Load() != before-1 || !q.Acquire(&open[2]) || q.Acquire(&open[0]) {
			t.Errorf("what one relay lets go of, another gets once: %s %v", name, []int64{open[0].Load(), open[1].Load(), open[2].Load()})
		}
	}
}

// A limit within another has no more open than either, and gives back to both.
func TestLimitWithin(t *testing.T) {
	outer := &Limit{Max: 3}
	inner := &Limit{Max: 2, Within: outer}
	var a, b atomic.Int64
	for range 3 {
		inner.Acquire(&a)
	}
	if a.Load() != 2 {
		t.Errorf("the inner limit of 2 has %d open", a.Load())
	}
	if !outer.Acquire(&b) || outer.Acquire(&b) {
		t.Errorf("the outer limit of 3 has %d open", a.Load()+b.Load())
	}
	inner.Release(&a)
	if !outer.Acquire(&b) || inner.Acquire(&a) {
		t.Error("the inner limit exceeds the outer one, or gives nothing back")
	}
	outer.Release(&b)
	if !inner.Acquire(&a) || a.Load() != 2 || b.Load() != 1 {
		t.Errorf("%d and %d are open, want 2 and 1", a.Load(), b.Load())
	}
}
