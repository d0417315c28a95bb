package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/procfs"

	"signalbox/internal/netlab"
)

// process is a program that runs on a host of the lab.
type process struct {
	pid     int
	began   time.Time
	cmd     *exec.Cmd
	logPath string
	// stop asks the program to end.
	stop context.CancelFunc
	// exited is closed when the program has ended; err says how.
	exited chan struct{}
	err    error
}

// exitTimeout is how long the program may take to end by itself.
const exitTimeout = 10 * time.Second

// startProcess starts a program whose output goes to the file logPath. The
// kernel kills the program when the demo itself is killed.
func startProcess(host *netlab.Host, logPath string, env []string, path string, args ...string) (*process, error) {
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the program has its own
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, log, log
	// A process group of its own: Ctrl-C at the terminal is for the demo, which
	// then ends the program in its own order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = exitTimeout

	p := &process{cmd: cmd, logPath: logPath, stop: stop, exited: make(chan struct{})}
	started := make(chan struct{})
	go func() {
		defer close(p.exited)
		// The death signal is sent when the thread ends that started the
		// program; this one waits until the program has ended.
		p.err = host.Do(func() error {
			p.began = time.Now()
			if err := cmd.Start(); err != nil {
				return err
			}
			p.pid = cmd.Process.Pid
			close(started)
			return cmd.Wait()
		})
	}()
	select {
	case <-started:
	case <-p.exited:
		if p.pid == 0 {
			stop()
			return nil, fmt.Errorf("starting %s: %w", path, p.err)
		}
	}
	return p, nil
}

// end asks the program to end, kills it if it does not within exitTimeout, and waits
// for it. It may be called again, and when the program has ended by itself.
func (p *process) end() {
	p.stop()
	<-p.exited
}

// failure says how an ended program failed, or returns nil if it was asked to
// end and did so without complaint.
func (p *process) failure() error {
	switch {
	case p.err == nil:
		return fmt.Errorf("pid %d ended by itself; its last words:\n%s", p.pid, p.lastWords())
	case !errors.Is(p.err, context.Canceled):
		return fmt.Errorf("pid %d ended: %w; its last words:\n%s", p.pid, p.err, p.lastWords())
	}
	return nil
}

// lastWords is the end of what the program wrote.
func (p *process) lastWords() string {
	log, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(log), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// processorTime is what an ended program and the programs it ran computed.
func (p *process) processorTime() time.Duration {
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// peakMemory is the most that a running program has held in memory, in bytes.
func (p *process) peakMemory() (int64, error) {
	proc, err := procfs.NewProc(p.pid)
	if err != nil {
		return 0, fmt.Errorf("memory of pid %d: %w", p.pid, err)
	}
	status, err := proc.NewStatus()
	if err != nil {
		return 0, fmt.Errorf("memory of pid %d: %w", p.pid, err)
	}
	return int64(status.VmHWM), nil
}

// recovered turns a panic into an error. What runs on another goroutine needs
// it: a panic there would end the demo without cleaning up.
func recovered(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return fn()
}
