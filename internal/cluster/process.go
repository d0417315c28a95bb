// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Process is a program in the background. It dies with the process that
// started it, however that ends.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when the program has ended
	err  error         // of Wait; read after done
}

// StartProcess starts cmd, whose output it appends to the file log. inside,
// where not nil, runs its argument where the program is to run, for example on
// a host of a lab; it is not done before the program is.
func StartProcess(cmd *exec.Cmd, log string, inside func(func() error) error) (*Process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	// A process group of its own: Ctrl-C at the terminal is for the process that started
	// the program, which then ends it in its own order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p := &Process{name: filepath.Base(cmd.Path), cmd: cmd, log: log, done: make(chan struct{})}
	if inside == nil {
		inside = func(run func() error) error { return run() }
	}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that started the program
		// ends, so this goroutine keeps its thread for as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := inside(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			started <- nil
			p.err = cmd.Wait()
			close(p.done)
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	return p, nil
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Pid is the program's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Signal sends a signal to the program; one that has ended gets nothing.
func (p *Process) Signal(s os.Signal) { _ = p.cmd.Process.Signal(s) }

// Stop asks the program to end, kills it after the timeout, and returns what
// Wait said: nil for exit code 0.
func (p *Process) Stop(timeout time.Duration) error {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(timeout):
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM; its log ends with\n%s", p.name, timeout, p.Tail(20))
	}
	return p.err
}

// Kill ends the program at once, as a crash would.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Err is what Wait said, once Done is closed.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Ended is nil while the program runs, and then says how it ended.
func (p *Process) Ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %s; its log ends with\n%s", p.name, p.cmd.ProcessState, p.Tail(20))
	default:
		return nil
	}
}

// Log is everything the program has written so far.
func (p *Process) Log() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Tail is the last n lines of Log.
func (p *Process) Tail(n int) string {
	lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
