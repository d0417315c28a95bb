// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"signalbox/e2e/vm/spec"
)

// Machine is what one virtual machine is made of.
type Machine struct {
	Kernel *Kernel
	// Guest is the path of the compiled package guest.
	Guest string
	// Program is the path of a static program to run, with Args. Env is added
	// to the environment, which holds no more than PATH and HOME.
	Program string
	Args    []string
	Env     []string
	// Modules are patterns of the kernel modules to load, see CommonModules.
	Modules []string
	// Tools are programs of this machine that Program calls, by their names.
	Tools []string
	// CPUs and MiB of memory; neither is taken before the machine uses it.
	CPUs, MiB int
	// Accel is QEMU's accelerator; "" for tcg, which works everywhere.
	Accel string
}

// Ending is how a machine ended.
type Ending struct {
	// Exit is the exit code of the program.
	Exit int
	// CPU is the processor time that QEMU took.
	CPU time.Duration
}

// errFault is that the kernel reported a fault of its own on its console.
var errFault = errors.New("the kernel reported a fault")

// Run starts the machine, copies what the program writes to output, and waits
// for the end of both. ready is called when the program starts. An error says
// why the program did not run to its end, and what the kernel's console has
// about it; a program that ended with another exit code than 0 is no error.
func (m *Machine) Run(ctx context.Context, ready func(), output io.Writer) (Ending, error) {
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		return Ending{}, err
	}
	defer os.RemoveAll(dir)
	initramfs := filepath.Join(dir, "initramfs")
	if err := m.writeInitramfs(ctx, initramfs); err != nil {
		return Ending{}, err
	}
	port, err := net.Listen("unix", filepath.Join(dir, "port"))
	if err != nil {
		return Ending{}, err
	}
	defer port.Close()
	cmd := m.command(initramfs, port.Addr().String())
	con := newConsole()
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = con, &said
	q, err := start(cmd)
	if err != nil {
		return Ending{}, err
	}
	stop := context.AfterFunc(ctx, q.kill)
	defer stop()
	go q.killWhenFaulty(con)
	go func() {
		<-q.done
		port.Close() // ends the wait for a connection that never came
	}()
	exit, err := listen(port, ready, output)
	if err != nil {
		q.kill()
	}
	<-q.done
	ending := Ending{exit, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
	report := con.report()
	switch {
	case report != "":
		return ending, fmt.Errorf("%w:\n%s\nqemu (%v) said: %s", errFault, report, q.err, said.Bytes())
	case ctx.Err() != nil:
		err = fmt.Errorf("the machine was ended: %w", context.Cause(ctx))
	}
	if err != nil {
		return ending, fmt.Errorf("%w\nqemu (%v) said: %s\nthe console ended with:\n%s", err, q.err, said.Bytes(), con.tail(60))
	}
	return ending, nil
}

// listen takes the machine's only connection and its events until the last.
func listen(port net.Listener, ready func(), output io.Writer) (exit int, err error) {
	conn, err := port.Accept()
	if err != nil {
		return 0, fmt.Errorf("qemu did not open its serial line: %w", err)
	}
	defer conn.Close()
	return receive(conn, ready, output)
}

var errCut = errors.New("the machine ended, or began to send something else, before its program did")

func receive(r io.Reader, ready func(), output io.Writer) (exit int, err error) {
	events := json.NewDecoder(bufio.NewReader(r))
	for {
		var e spec.Event
		if err := events.Decode(&e); err != nil {
			return 0, fmt.Errorf("%w: %v", errCut, err)
		}
		if e.Ready {
			ready()
		}
		if _, err := output.Write(e.Output); err != nil {
			return 0, err
		}
		switch {
		case e.Error != "":
			return 0, fmt.Errorf("in the machine: %s", e.Error)
		case e.Exit != nil:
			return *e.Exit, nil
		}
	}
}

// bootOptions are those of the kernel. A panic, or what would let a kernel run
// on after it noticed a fault of its own, ends the machine. What costs time and
// protects from nobody here is off; waiting for other processors actively makes
// network namespaces, of which a lab has many, in half the time.
//
// The kernel reports what stands still for a minute, or a task that waits for
// four. Its own limits are 20 s and two minutes, which a machine can reach that
// gets little of a busy host's time.
const bootOptions = "console=ttyS0 panic=-1 oops=panic reboot=t,force " +
	"mitigations=off init_on_alloc=0 apparmor=0 audit=0 rcupdate.rcu_expedited=1 random.trust_cpu=on loglevel=5 " +
	"rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30 sysctl.kernel.hung_task_timeout_secs=240"

func (m *Machine) command(initramfs, port string) *exec.Cmd {
	accel := m.Accel
	if accel == "" {
		accel = "tcg"
	}
	return exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", accel, "-cpu", "max", "-smp", strconv.Itoa(m.CPUs), "-m", strconv.Itoa(m.MiB),
		"-kernel", m.Kernel.Image, "-initrd", initramfs, "-append", bootOptions,
		"-serial", "stdio", "-serial", "unix:"+port)
}

// writeInitramfs writes everything that the machine's memory holds at first.
func (m *Machine) writeInitramfs(ctx context.Context, file string) error {
	modules, err := m.Kernel.modules(m.Modules)
	if err != nil {
		return err
	}
	t := tree{}
	s := spec.Spec{Program: "/program", Args: m.Args, Dir: "/", Env: append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"}, m.Env...)}
	for _, mod := range modules {
		name := "/modules/" + mod.name + ".ko"
		t.file(name, mod.file)
		s.Modules = append(s.Modules, name)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	t.text(spec.File, text)
	t.text("/etc/protocols", []byte("tcp 6 TCP\nudp 17 UDP\nsctp 132 SCTP\n")) // ipset knows no protocol without it
	t.file("/init", m.Guest)
	t.file(s.Program, m.Program)
	t.device("/dev/console", 5, 1)
	if err := t.programs(ctx, m.Tools); err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := t.write(w); err != nil {
		return err
	}
	return errors.Join(w.Flush(), f.Close())
}

// process is a running QEMU.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait; read after done
}

// start starts a program that dies with this process, however that ends.
func start(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that started the program
		// ends, so this goroutine keeps its thread for as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd.Args[0], err)
	}
	return p, nil
}

func (p *process) kill() { _ = p.cmd.Process.Kill() } // one that has ended needs none

// stackTime is how long a kernel that reported a fault runs on, to write the
// stack that belongs to the report.
const stackTime = 5 * time.Second

// killWhenFaulty ends a machine whose kernel reports a fault: it would stand
// still until the time for the whole run is over.
func (p *process) killWhenFaulty(con *console) {
	select {
	case <-p.done:
		return
	case <-con.faulty:
	}
	select {
	case <-p.done:
	case <-time.After(stackTime):
		p.kill()
	}
}
