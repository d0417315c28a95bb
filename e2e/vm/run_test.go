// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const (
	// limit ends a machine that hangs; several times what the slowest test
	// takes on two emulated processors that others use, too.
	limit = 75 * time.Minute
	// grace is how much earlier the test binary inside ends by itself, so that
	// it can say where it hangs.
	grace = time.Minute
)

// guestTest is a package whose tests run in a machine.
type guestTest struct {
	// dir is where `go test -c` runs, and pkg what it compiles, with tags.
	dir, pkg, tags string
	tools          []string
	// programs are more tools: the path of each goes into a variable of the
	// environment.
	programs map[string]string
	// overlay, where not empty, has go build replace source files; env is for the tests.
	overlay string
	env     []string
	// only and skip are patterns for -run and -skip, where those given to this
	// test say nothing about the tests inside.
	only, skip string
	count      int // how often the tests run; 0 for once
}

// run runs the tests in a machine of their own, as subtests of t. A machine
// keeps one processor busy, so others run beside it.
func (g guestTest) run(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	kernel := fetchKernel(t)
	dir := t.TempDir()
	m := &Machine{
		Kernel: kernel, Guest: filepath.Join(dir, "guest"), Program: filepath.Join(dir, "tests"),
		Tools: g.tools, CPUs: 1, MiB: 3072, Modules: CommonModules, Accel: os.Getenv("SIGNALBOX_VM_ACCEL"),
		Env: []string{"SIGNALBOX_VM_RELEASE=" + kernel.Release},
	}
	for variable, path := range g.programs {
		m.Tools, m.Env = append(m.Tools, path), append(m.Env, variable+"="+path)
	}
	end := time.Now().Add(limit)
	if d, ok := t.Deadline(); ok && d.Before(end) {
		end = d.Add(-grace)
	}
	m.Args = append([]string{"-test.v=test2json", fmt.Sprintf("-test.timeout=%v", time.Until(end)-grace)}, g.choice(t.Name())...)
	goBuild(t, ".", "build", "-o", m.Guest, "./guest")
	m.Env = append(m.Env, g.env...)
	goBuild(t, g.dir, "test", "-c", "-overlay", g.overlay, "-tags", g.tags, "-o", m.Program, g.pkg)
	ctx, cancel := context.WithDeadlineCause(ctx, end, fmt.Errorf("its time of %v was over", limit))
	defer cancel()
	follow(ctx, t, m)
}

// follow runs a machine and makes the tests inside subtests of t while they
// run.
func follow(ctx context.Context, t *testing.T, m *Machine) {
	convert := exec.CommandContext(ctx, "go", "tool", "test2json", "-t") // -t: with the time that each test took
	in, err := convert.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := convert.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	convert.Stderr = os.Stderr
	if err := convert.Start(); err != nil {
		t.Fatal(err)
	}
	type ending struct {
		Ending
		err error
	}
	ended := make(chan ending, 1)
	began := time.Now()
	var boot time.Duration
	go func() {
		defer in.Close()
		var e ending
		e.Ending, e.err = m.Run(ctx, func() { boot = time.Since(began) }, in)
		ended <- e
	}()
	all := newResults()
	if testing.Verbose() {
		all.stream = t.Output()
	}
	read := make(chan error, 1)
	go func() { read <- all.read(out) }()
	all.mirror(t, all.root)
	e := <-ended
	t.Logf("kernel %s: the tests began after %v and ended after %v; qemu took %v of processor time", m.Kernel.Release,
		boot.Round(time.Millisecond), time.Since(began).Round(time.Millisecond), e.CPU.Round(time.Millisecond))
	switch {
	case e.err != nil:
		t.Errorf("tests that were running: %q\n%v", all.cut(), e.err)
	case e.Exit != 0 && !t.Failed():
		t.Errorf("the test binary ended with exit code %d", e.Exit)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	if err := convert.Wait(); err != nil {
		t.Errorf("go tool test2json: %v", err)
	}
	if len(all.root.children) == 0 && !t.Failed() {
		t.Error("no test ran in the machine")
	}
}

// choice passes on what the parts of -run and -skip below a test choose.
func (g guestTest) choice(test string) []string {
	args := []string{"-test.parallel=4", fmt.Sprintf("-test.count=%d", max(g.count, 1))} // much of the contract is waiting
	only, skip := g.only, g.skip
	if rest, none := inside(flag.Lookup("test.run").Value.String(), test); !none && rest != "" {
		only, skip = rest, ""
	}
	if rest, none := inside(flag.Lookup("test.skip").Value.String(), test); !none && rest != "" {
		skip = rest
	}
	if only != "" {
		args = append(args, "-test.run="+only)
	}
	if skip != "" {
		args = append(args, "-test.skip="+skip)
	}
	return args
}

// fetchKernel is the kernel of all machines of these tests.
func fetchKernel(t *testing.T) *Kernel {
	t.Helper()
	cache, err := filepath.Abs("../.cache/kernel")
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := FetchKernel(t.Context(), cache, cmp.Or(os.Getenv("SIGNALBOX_VM_KERNEL"), DefaultKernel))
	if err != nil {
		t.Fatal(err)
	}
	return kernel
}

// goBuild makes a static program: the machine has no libraries for it.
func goBuild(t *testing.T, dir, command string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{command, "-trimpath", "-ldflags", "-s -w"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", command, err, out)
	}
}
