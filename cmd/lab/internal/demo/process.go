package demo

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"signalbox/internal/netlab"
)

// process is a program that runs on a host of the lab.
type process struct {
	pid     int
	began   time.Time
	cmd     *exec.Cmd
	logPath string
	// exited is closed when the program has ended; err says how.
	exited chan struct{}
	err    error
	asked  bool // to end
}

// startProcess starts a program whose output goes to the file logPath. The
// kernel kills the program when the demo itself is killed.
func startProcess(host *netlab.Host, logPath string, env []string, path string, args ...string) (*process, error) {
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the program has its own
	cmd := exec.Command(path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, log, log
	// A process group of its own: Ctrl-C at the terminal is for the demo, which
	// then ends the program in its own order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	p := &process{cmd: cmd, logPath: logPath, exited: make(chan struct{})}
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
		return p, nil
	case <-p.exited:
		if p.pid == 0 {
			return nil, fmt.Errorf("starting %s: %w", path, p.err)
		}
		return p, nil
	}
}

// endPatience is how long the program may take to end by itself.
const endPatience = 10 * time.Second

// end asks the program to end, waits for it, and kills it if it does not. It may
// be called again, and when the program has ended by itself.
func (p *process) end() error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	p.asked = true
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending pid %d: %w", p.pid, err)
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(endPatience):
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing pid %d: %w", p.pid, err)
	}
	<-p.exited
	return fmt.Errorf("pid %d did not end within %v of SIGTERM and was killed; its last words:\n%s", p.pid, endPatience, p.lastWords())
}

// failure says how an ended program failed, or returns nil if it was asked to
// end and did so without complaint.
func (p *process) failure() error {
	switch {
	case p.err != nil:
		return fmt.Errorf("pid %d ended: %w; its last words:\n%s", p.pid, p.err, p.lastWords())
	case !p.asked:
		return fmt.Errorf("pid %d ended by itself; its last words:\n%s", p.pid, p.lastWords())
	}
	return nil
}

// lastWords is the end of what the program wrote.
func (p *process) lastWords() string {
	log, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	return lastLines(log, 12)
}

func lastLines(text []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// processorTime is what an ended program and the programs it ran computed.
func (p *process) processorTime() time.Duration {
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// peakMemory is the most that a running program has held in memory, in bytes.
func (p *process) peakMemory() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, fmt.Errorf("memory of pid %d: %w", p.pid, err)
	}
	return peakOf(status)
}

// peakOf reads VmHWM, the resident set's high-water mark, from a process's
// status.
func peakOf(status []byte) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(status))
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) == 3 && words[0] == "VmHWM:" && words[2] == "kB" {
			kib, err := strconv.ParseInt(words[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the process status has no VmHWM line")
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
