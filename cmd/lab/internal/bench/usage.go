package bench

import (
	"context"
	"fmt"
	"time"

	"signalbox/internal/wait"

	"github.com/prometheus/procfs"
)

// usage is what a process has used so far.
type usage struct {
	// processor is its processor time in nanoseconds, and that of the programs that it
	// ran and waited for, such as iptables-restore, in hundredths of a second.
	processor time.Duration
	resident  float64 // bytes now
	peak      float64 // bytes at most
}

const clockTick = time.Second / 100 // USER_HZ, the same on every architecture of Go

func usageOf(pid int) (usage, error) {
	fail := func(err error) (usage, error) { return usage{}, fmt.Errorf("usage of process %d: %w", pid, err) }
	proc, err := procfs.NewProc(pid)
	if err != nil {
		return fail(err)
	}
	stat, err := proc.Stat()
	if err != nil {
		return fail(err)
	}
	status, err := proc.NewStatus()
	if err != nil {
		return fail(err)
	}
	threads, err := procfs.AllThreads(pid)
	if err != nil {
		return fail(err)
	}
	used := time.Duration(stat.CUTime+stat.CSTime) * clockTick
	for _, thread := range threads {
		// A thread can end meanwhile. Threads of the Go runtime do not.
		if s, err := thread.Schedstat(); err == nil {
			used += time.Duration(s.RunningNanoseconds)
		}
	}
	return usage{processor: used, resident: float64(status.VmRSS), peak: float64(status.VmHWM)}, nil
}

const (
	quietWindow = time.Second
	// quietShare is the share of one processor below which a proxy counts as settled.
	quietShare = 0.03
)

// settle waits until a process is quiet for two windows, and returns its usage at the
// beginning of these.
func settle(ctx context.Context, pid int) (usage, error) {
	before, err := usageOf(pid)
	if err != nil {
		return before, err
	}
	for quiet, last := 0, before; ; {
		if !wait.For(ctx, quietWindow) {
			return before, ctx.Err()
		}
		now, err := usageOf(pid)
		if err != nil {
			return before, err
		}
		if now.processor-last.processor <= time.Duration(quietShare*float64(quietWindow)) {
			quiet++
		} else {
			quiet, before = 0, now
		}
		if last = now; quiet == 2 {
			return before, nil
		}
	}
}
