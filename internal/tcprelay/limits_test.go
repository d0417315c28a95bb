package tcprelay

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"signalbox/proxier"
)

func TestQuietLog(t *testing.T) {
	var q Log
	now := time.Now()
	of := func(n int) remark { return remark{"it fails", proxier.ServicePortName{Port: fmt.Sprint(n)}} }
	if !q.fresh(of(0), now) || q.fresh(of(0), now.Add(quiet-1)) || !q.fresh(of(1), now) {
		t.Error("something is not said once of each Service port")
	}
	for n := range 2 * maxRemarks {
		q.fresh(of(n), now)
	}
	if len(q.last) != maxRemarks {
		t.Errorf("%d remarks are remembered, want %d", len(q.last), maxRemarks)
	}
	if !q.fresh(of(0), now.Add(quiet)) || len(q.last) != 1 {
		t.Error("what was said long ago is not forgotten")
	}
}

func TestLimitsFor(t *testing.T) {
	for _, files := range []uint64{0, 256, 1024, 20000, 1 << 20} {
		l := limitsFor(files)
		used := l.Connections.Most*filesPerConnection + l.Flows.Most*filesPerFlow
		if l.Connections.Most < 1 || l.Flows.Most < 1 || files > 2*filesKept && used > int64(files-filesKept) {
			t.Errorf("%d files: %d connections and %d flows", files, l.Connections.Most, l.Flows.Most)
		}
	}
}

// However many relays a process has for a while, they have no more open than
// one.
func TestRelaysShareLimits(t *testing.T) {
	const files, relays = 20000, 4
	l := limitsFor(files)
	for name, q := range map[string]*Quota{"connections": &l.Connections, "flows": &l.Flows} {
		var open [relays]atomic.Int64
		full := int64(0)
		for q.Enter(&open[full%relays]) {
			full++
		}
		if full != q.Most || q.Enter(&open[1]) {
			t.Errorf("%d %s are open, want %d", full, name, q.Most)
		}
		before := open[1].Load()
		q.Leave(&open[1])
		if open[1].Load() != before-1 || !q.Enter(&open[2]) || q.Enter(&open[0]) {
			t.Errorf("what one relay lets go of, another gets once: %s %v", name, []int64{open[0].Load(), open[1].Load(), open[2].Load()})
		}
	}
}
