// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"regexp"
	"strings"
	"sync"
)

// faults are the beginnings of the reports in which a kernel says that it is
// broken or stands still. After each comes the stack of what it was doing. A
// report begins its line, or follows its time in the middle of what a program
// is writing.
var faults = regexp.MustCompile(`(^|\[ *[0-9]+\.[0-9]+\] )(` + strings.Join([]string{
	`rcu: INFO: .* stall`,        // "rcu_sched self-detected stall on CPU", "rcu_sched detected expedited stalls on CPUs/tasks"
	`watchdog: BUG: `,            // "soft lockup - CPU#0 stuck for 22s!"
	`INFO: task .* blocked for `, // "INFO: task kworker/u4:2:43 blocked for more than 120 seconds."
	`BUG: `, `kernel BUG at `, `Oops: `, `Kernel panic - not syncing`,
	`general protection fault`, `int3: `, `invalid opcode: `, `divide error: `, `stack segment: `,
}, "|") + ")")

// console is what the kernel wrote, and notices the first report of a fault.
type console struct {
	faulty chan struct{} // closed at the first report

	mu      sync.Mutex
	partial []byte   // of the line that has not ended
	lines   []string // without the carriage returns of a terminal
	fault   int      // index of the first report's first line; -1 for none
}

func newConsole() *console { return &console{faulty: make(chan struct{}), fault: -1} }

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.partial = append(c.partial, p...)
	for {
		line, rest, ended := bytes.Cut(c.partial, []byte("\n"))
		if !ended {
			return len(p), nil
		}
		c.partial = rest
		c.add(strings.TrimRight(string(line), "\r"))
	}
}

func (c *console) add(line string) {
	c.lines = append(c.lines, line)
	if c.fault < 0 && faults.MatchString(line) {
		c.fault = len(c.lines) - 1
		close(c.faulty)
	}
}

// report is the first report of a fault with what followed; "" for none.
func (c *console) report() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault < 0 {
		return ""
	}
	return strings.Join(c.lines[c.fault:], "\n")
}

// tail is the end of all that the kernel wrote.
func (c *console) tail(lines int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := strings.Join(c.lines[max(0, len(c.lines)-lines):], "\n")
	return strings.TrimSpace(text + "\n" + string(c.partial))
}
