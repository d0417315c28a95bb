// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/utils/cpuset"
)

// Conntrack holds the wanted settings of the kernel's connection tracking. A zero
// keeps the kernel's value.
type Conntrack struct {
	// MaxPerCore is multiplied by the machine's CPUs. So many connections can be
	// tracked, but at least Min. A product above maxTracked counts as maxTracked,
	// whatever Min is. Without MaxPerCore, Min has no effect.
	MaxPerCore, Min int32
	// The timeouts are rounded up to whole seconds.
	TCPEstablishedTimeout, TCPCloseWaitTimeout time.Duration
	// TCPBeLiberal tracks TCP segments outside the window too. False keeps the
	// kernel's value.
	TCPBeLiberal                 bool
	UDPTimeout, UDPStreamTimeout time.Duration
}

// maxTracked bounds the product of MaxPerCore and the CPUs, as kube-proxy does
// since 1.36: the kernel allocates the table's buckets at once.
const maxTracked = 1 << 20

// KernelProblem is a kernel setting that could not be set.
type KernelProblem struct {
	File          string
	Wanted, Found string // Found is empty where it could not be read
	Err           error
	// Impact says what does not work meanwhile; may be empty.
	Impact string
	remedy string // replaces the usual one
}

func (p *KernelProblem) Error() string {
	found := p.Found
	if found == "" {
		found = "not known"
	}
	return fmt.Sprintf("%s should be %s and is %s: %v", p.File, p.Wanted, found, p.Err)
}

func (p *KernelProblem) Unwrap() error { return p.Err }

// Name returns the setting's name for sysctl(8), or the path of a setting that
// is no sysctl.
func (p *KernelProblem) Name() string { return nameOf(p.File) }

// Remedy says what an operator can do about it.
func (p *KernelProblem) Remedy() string {
	switch {
	case p.remedy != "":
		return p.remedy
	case errors.Is(p.Err, fs.ErrNotExist):
		return "load the kernel module nf_conntrack on the node"
	case errors.Is(p.Err, fs.ErrPermission), errors.Is(p.Err, syscall.EROFS):
		return fmt.Sprintf("run signalbox --init-only in a privileged container first, or set it on the node: echo %s > %s", p.Wanted, p.File)
	}
	return fmt.Sprintf("set it on the node: echo %s > %s", p.Wanted, p.File)
}

// JoinProblems returns one error for all problems with their remedies, or nil.
func JoinProblems(problems []*KernelProblem) error {
	var failed []error
	for _, p := range problems {
		failed = append(failed, fmt.Errorf("%w; %s", p, p.Remedy()))
	}
	return errors.Join(failed...)
}

// TuneConntrack sets the kernel's connection tracking as kube-proxy does, but
// never lowers the number of connections that can be tracked. It returns the
// settings that could not be written; the others are written all the same.
func TuneConntrack(want Conntrack) []*KernelProblem {
	return kernelFiles{sysctls: sysctlRoot, modules: "/sys/module", load: loadConntrack}.tuneConntrack(want, cpus())
}

// kernelFiles are the folders of a kernel's settings.
type kernelFiles struct {
	sysctls, modules string
	load             func() // makes the kernel load connection tracking
}

func (k kernelFiles) tuneConntrack(want Conntrack, cpus int) []*KernelProblem {
	dir := filepath.Join(k.sysctls, "net/netfilter")
	if _, err := os.Stat(dir + "/nf_conntrack_max"); errors.Is(err, fs.ErrNotExist) {
		k.load()
	}
	var problems []*KernelProblem
	add := func(p *KernelProblem) {
		if p != nil {
			problems = append(problems, p)
		}
	}
	if n := want.tracked(cpus); n > 0 {
		add(setAtLeast(dir+"/nf_conntrack_max", n))
		add(setAtLeast(filepath.Join(k.modules, "nf_conntrack/parameters/hashsize"), n/4))
	}
	for _, t := range []struct {
		name    string
		timeout time.Duration
	}{
		{"tcp_timeout_established", want.TCPEstablishedTimeout},
		{"tcp_timeout_close_wait", want.TCPCloseWaitTimeout},
		{"udp_timeout", want.UDPTimeout},
		{"udp_timeout_stream", want.UDPStreamTimeout},
	} {
		if t.timeout > 0 {
			add(set(dir+"/nf_conntrack_"+t.name, seconds(t.timeout)))
		}
	}
	if want.TCPBeLiberal {
		add(set(dir+"/nf_conntrack_tcp_be_liberal", "1"))
	}
	return problems
}

// tracked returns how many connections the kernel shall be able to track; 0
// keeps the kernel's value.
func (c Conntrack) tracked(cpus int) int {
	if c.MaxPerCore <= 0 {
		return 0
	}
	product := int(c.MaxPerCore) * cpus
	if product > maxTracked {
		return maxTracked
	}
	return max(product, int(c.Min))
}

func seconds(d time.Duration) string {
	return strconv.Itoa(int((d + time.Second - 1) / time.Second))
}

// setAtLeast raises a setting that is less than n.
func setAtLeast(file string, n int) *KernelProblem {
	text, err := readSetting(file)
	if err != nil {
		return &KernelProblem{File: file, Wanted: strconv.Itoa(n), Err: err}
	}
	if now, err := strconv.Atoi(text); err == nil && now >= n {
		return nil
	}
	return set(file, strconv.Itoa(n))
}

func set(file, value string) *KernelProblem {
	err := writeSetting(file, value)
	if err == nil {
		return nil
	}
	found, _ := readSetting(file)
	return &KernelProblem{File: file, Wanted: value, Found: found, Err: err}
}

// loadConntrack lists the connections. The kernel loads the module for that
// itself, so the container needs no modprobe.
func loadConntrack() {
	_, _ = netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
}

// cpus returns the number of the machine's CPUs, of which this process may be
// allowed to use fewer.
func cpus() int {
	if n, err := cpuset.NumCPU(); err == nil && n > 0 {
		return n
	}
	return runtime.NumCPU()
}
