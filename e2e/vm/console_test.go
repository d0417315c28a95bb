// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConsole reads consoles as machines wrote them. Their reports begin with
// a line that is known, and hold the stack.
func TestConsole(t *testing.T) {
	for _, c := range []struct{ file, begins, holds string }{
		{"hook.console", "rcu: INFO: rcu_preempt self-detected stall on CPU", "asm_exc_int3"},
		{"panic.console", "Kernel panic - not syncing: sysrq triggered crash", "sysrq_handle_crash"},
		{"healthy.console", "", ""},
	} {
		t.Run(c.file, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("testdata", c.file))
			if err != nil {
				t.Fatal(err)
			}
			con := newConsole()
			for len(text) > 0 { // as QEMU writes: a few bytes at a time
				n := min(7, len(text))
				if _, err := con.Write(text[:n]); err != nil {
					t.Fatal(err)
				}
				text = text[n:]
			}
			report := con.report()
			first, _, _ := strings.Cut(report, "\n")
			if !strings.Contains(first, c.begins) || !strings.Contains(report, c.holds) || (report == "") != (c.begins == "") {
				t.Errorf("the report is %q", report)
			}
			select {
			case <-con.faulty:
				if c.begins == "" {
					t.Error("a healthy machine would be ended")
				}
			default:
				if c.begins != "" {
					t.Error("the machine would run on")
				}
			}
		})
	}
}

// TestFaults knows each kind of report, with and without its time, and none in
// what else a kernel or a program writes.
func TestFaults(t *testing.T) {
	for line, want := range map[string]bool{
		"rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:":                                                true,
		"[  297.137821] rcu: INFO: rcu_sched detected expedited stalls on CPUs/tasks: { 1-.... }":              true,
		"[   44.060013] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [kworker/u4:1:12]":                   true,
		"guest: starting /prog[    3.839277] rcu: INFO: rcu_sched self-detected stall on CPU":                  true,
		"[  242.771218] INFO: task kworker/u4:2:43 blocked for more than 120 seconds.":                         true,
		"[    9.133071] BUG: unable to handle page fault for address: ffffffffc0a01000":                        true,
		"[    9.133071] kernel BUG at net/core/skbuff.c:112!":                                                  true,
		"[    9.133071] general protection fault, probably for non-canonical address 0xdead000000000108":       true,
		"[    9.133071] int3: 0000 [#1] PREEMPT SMP NOPTI":                                                     true,
		"[    1.020304] traps: tests[211] general protection fault ip:401000 sp:7ffe error:0 in tests[400000]": false,
		"[    0.311120] rcu: Hierarchical SRCU implementation.":                                                false,
		"[    5.000001] IPVS: rr: TCP 10.96.0.1:80 - no destination available":                                 false,
		"guest: BUG: said by a program":                                                                        false,
	} {
		if got := faults.MatchString(line); got != want {
			t.Errorf("%q: %v, want %v", line, got, want)
		}
	}
}
