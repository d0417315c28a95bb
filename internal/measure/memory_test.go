// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bufio"
	"fmt"
	"os/exec"
	"testing"
)

func TestKernelMemory(t *testing.T) {
	for text, want := range map[string]float64{
		"333062144\n": 333062144,
		"anon 4096\nkernel 8192\nkernel_stack 16384\n": 8192,
		"anon 4096\n": -1,
		"":            -1,
	} {
		got, err := kernelMemory(text)
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: got %v (%v), want %v", text, got, err, want)
		}
	}
}

// A group counts what a program of its process makes the kernel keep: here directories.
func TestMemoryGroup(t *testing.T) {
	g, err := NewMemoryGroup()
	if err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("sh", "-c", "read go; mkdir $(seq 2000); echo made; read end")
	cmd.Dir = t.TempDir()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	before, err := g.Kernel()
	if err != nil {
		t.Error(err)
	}
	fmt.Fprintln(in, "go")
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Error(err)
	}
	const atLeast = 2000 * 128 // less than one inode for each directory
	if after, err := g.Kernel(); err != nil || after < before+atLeast {
		t.Errorf("%v bytes before, %v with 2000 directories more (%v)", before, after, err)
	}
	in.Close()
	cmd.Wait()
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}
