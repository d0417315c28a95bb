// SPDX-License-Identifier: Apache-2.0

// Guest is process 1 of the virtual machines of package vm. It prepares the
// kernel, runs one program, sends what the program writes to the host, and
// turns the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"signalbox/e2e/vm/spec"
)

func main() {
	code, err := run()
	if err != nil {
		// Whoever reads the console finds the reason there, too, should the
		// port be what failed.
		fmt.Println("guest:", err)
		code = -1
	}
	if port != nil {
		send(spec.Event{Exit: &code, Error: message(err)})
		drain(port)
	}
	unix.Sync()
	// The host starts QEMU so that a restart ends it. A return would make the
	// kernel panic, which has the same end.
	fmt.Println("guest: restart:", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

var port *os.File

func run() (code int, err error) {
	if err := mounts(); err != nil {
		return 0, err
	}
	if port, err = openPort(); err != nil {
		return 0, err
	}
	text, err := os.ReadFile(spec.File)
	if err != nil {
		return 0, err
	}
	var s spec.Spec
	if err := json.Unmarshal(text, &s); err != nil {
		return 0, fmt.Errorf("%s: %w", spec.File, err)
	}
	for _, m := range s.Modules {
		if err := load(m); err != nil {
			return 0, err
		}
	}
	if err := loopback(); err != nil {
		return 0, err
	}
	// An API server writes the hostname into a label, which must not be "(none)".
	if err := unix.Sethostname([]byte("machine")); err != nil {
		return 0, fmt.Errorf("setting the hostname: %w", err)
	}
	return execute(&s)
}

func mounts() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	return os.Chmod("/tmp", 0o1777)
}

// openPort opens the serial line and takes the terminal's editing away, which
// would change what is sent.
func openPort() (*os.File, error) {
	f, err := os.OpenFile(spec.Port, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	raw := &unix.Termios{Cflag: unix.CS8 | unix.CLOCAL | unix.B115200}
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, raw); err != nil {
		return nil, fmt.Errorf("%s: %w", spec.Port, err)
	}
	return f, nil
}

// drain waits until everything written has left the serial line.
func drain(f *os.File) {
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1); err != nil {
		fmt.Println("guest: draining", f.Name(), err)
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if err != nil && !errors.Is(err, unix.EEXIST) { // EEXIST: built in, or loaded by the kernel itself
		return fmt.Errorf("loading module %s: %w", filepath.Base(path), err)
	}
	return nil
}

func loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("setting lo up: %w", err)
	}
	return nil
}

// leftoverWait bounds the wait for the output of processes that the program
// left behind. They end with the machine.
const leftoverWait = 10 * time.Second

// execute runs the program and returns its exit code.
func execute(s *spec.Spec) (int, error) {
	cmd := exec.Command(s.Program, s.Args...)
	cmd.Env, cmd.Dir = s.Env, s.Dir
	cmd.Stdout, cmd.Stderr = output{}, output{}
	cmd.WaitDelay = leftoverWait
	fmt.Printf("guest: starting %s with %d modules loaded\n", s.Program, len(s.Modules))
	send(spec.Event{Ready: true})
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return 0, fmt.Errorf("starting %s: %w", s.Program, err)
	}
	return cmd.ProcessState.ExitCode(), nil
}

// output sends what is written to it.
type output struct{}

func (output) Write(b []byte) (int, error) {
	send(spec.Event{Output: b})
	return len(b), nil
}

func send(e spec.Event) {
	if err := json.NewEncoder(port).Encode(e); err != nil {
		fmt.Println("guest:", err)
	}
}
