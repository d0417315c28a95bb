// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// MemoryGroup is a control group. It counts the memory of the kernel that its processes
// cause, such as that of rules, also after they have ended.
type MemoryGroup struct{ dir, file string }

// NewMemoryGroup makes a control group. The error says what the machine lacks.
func NewMemoryGroup() (*MemoryGroup, error) {
	root, file := "/sys/fs/cgroup/memory", "memory.kmem.usage_in_bytes" // version 1
	if _, err := os.Stat(root); err != nil {
		root, file = "/sys/fs/cgroup", "memory.stat" // version 2
	}
	dir, err := os.MkdirTemp(root, "signalbox-lab-")
	if err != nil {
		return nil, fmt.Errorf("make a control group: %w", err)
	}
	g := &MemoryGroup{dir, filepath.Join(dir, file)}
	if _, err := g.Kernel(); err != nil {
		os.Remove(dir)
		return nil, fmt.Errorf("a new control group in %s does not count memory of the kernel: %w", root, err)
	}
	return g, nil
}

// Add puts a process into the group, and the programs that it starts from then on.
func (g *MemoryGroup) Add(pid int) error {
	return os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// Kernel is the memory of the kernel in bytes.
func (g *MemoryGroup) Kernel() (float64, error) {
	text, err := os.ReadFile(g.file)
	if err != nil {
		return 0, err
	}
	return kernelMemory(string(text))
}

// kernelMemory reads a file with the number alone, or with a line for each kind of memory.
func kernelMemory(text string) (float64, error) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 1 || len(words) == 2 && words[0] == "kernel" {
			return strconv.ParseFloat(words[len(words)-1], 64)
		}
	}
	return 0, fmt.Errorf("no line about the kernel, which Linux 5.18 and later have, in %q", text)
}

// Remove removes the group, whose processes have ended.
func (g *MemoryGroup) Remove() error { return os.Remove(g.dir) }
