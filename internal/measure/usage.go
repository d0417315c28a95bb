// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/procfs"

	"signalbox/internal/wait"
)

// Usage is what a process has used so far.
type Usage struct {
	// Processor is its processor time in nanoseconds, and that of the programs that it
	// ran and waited for, such as iptables-restore, in hundredths of a second.
	Processor time.Duration
	Resident  float64 // bytes now
	Peak      float64 // bytes at most
}

const clockTick = time.Second / 100 // USER_HZ, the same on every architecture of Go

// UsageOf reads the usage of a process that runs.
func UsageOf(pid int) (Usage, error) {
	fail := func(err error) (Usage, error) { return Usage{}, fmt.Errorf("usage of process %d: %w", pid, err) }
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
	return Usage{Processor: used, Resident: float64(status.VmRSS), Peak: float64(status.VmHWM)}, nil
}

const (
	quietWindow = time.Second
	// quietShare is the share of one processor below which a proxy counts as settled.
	quietShare = 0.03
)

// Settle waits until a process is quiet for two windows, and returns its usage at the
// beginning of these.
func Settle(ctx context.Context, pid int) (Usage, error) {
	before, err := UsageOf(pid)
	if err != nil {
		return before, err
	}
	for quiet, last := 0, before; ; {
		if !wait.For(ctx, quietWindow) {
			return before, ctx.Err()
		}
		now, err := UsageOf(pid)
		if err != nil {
			return before, err
		}
		if now.Processor-last.Processor <= time.Duration(quietShare*float64(quietWindow)) {
			quiet++
		} else {
			quiet, before = 0, now
		}
		if last = now; quiet == 2 {
			return before, nil
		}
	}
}
