package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
)

// Conntrack is what the kernel's connection tracking is set to. A zero leaves
// what the kernel has.
type Conntrack struct {
	// MaxPerCore times the machine's CPUs is how many connections can be
	// tracked: at least Min, or maxTracked where the product is more than that.
	// Without MaxPerCore, Min sets nothing.
	MaxPerCore, Min int32
	// The time-outs are in whole seconds; a part of one counts as one.
	TCPEstablishedTimeout, TCPCloseWaitTimeout time.Duration
	// TCPBeLiberal tracks TCP segments outside the window too. False leaves
	// what the kernel has.
	TCPBeLiberal                 bool
	UDPTimeout, UDPStreamTimeout time.Duration
}

// maxTracked bounds what MaxPerCore asks for on machines with many CPUs, since
// kube-proxy 1.36: the table's buckets are allocated at once.
const maxTracked = 1 << 20

// KernelProblem is a kernel setting that is not as it was wanted.
type KernelProblem struct {
	File          string
	Wanted, Found string // Found is empty where it could not be read
	Err           error
	// Without says what does not work as long as it is so; may be empty.
	Without string
	remedy  string // in the place of the usual one
}

func (p *KernelProblem) Error() string {
	found := p.Found
	if found == "" {
		found = "not known"
	}
	return fmt.Sprintf("%s should be %s and is %s: %v", p.File, p.Wanted, found, p.Err)
}

func (p *KernelProblem) Unwrap() error { return p.Err }

// Name is what sysctl(8) calls the setting, or the path of one that it does
// not know.
func (p *KernelProblem) Name() string { return nameOf(p.File) }

// Remedy is what an operator can do about it.
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

// Unmade is one error for all of the problems, each with its remedy; nil for
// none.
func Unmade(problems []*KernelProblem) error {
	var failed []error
	for _, p := range problems {
		failed = append(failed, fmt.Errorf("%w; %s", p, p.Remedy()))
	}
	return errors.Join(failed...)
}

// TuneConntrack makes the kernel's settings of connection tracking what want
// says, as kube-proxy does, but never lowers how many connections can be
// tracked. What cannot be written is in the list and keeps nothing else from
// being written.
func TuneConntrack(want Conntrack) []*KernelProblem {
	return kernelFiles{sysctls: sysctlRoot, modules: "/sys/module", load: loadConntrack}.tuneConntrack(want, cpus())
}

// kernelFiles is where a kernel's settings are.
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
	note := func(p *KernelProblem) {
		if p != nil {
			problems = append(problems, p)
		}
	}
	if n := want.tracked(cpus); n > 0 {
		note(raise(dir+"/nf_conntrack_max", n))
		note(raise(filepath.Join(k.modules, "nf_conntrack/parameters/hashsize"), n/4))
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
			note(set(dir+"/nf_conntrack_"+t.name, seconds(t.timeout)))
		}
	}
	if want.TCPBeLiberal {
		note(set(dir+"/nf_conntrack_tcp_be_liberal", "1"))
	}
	return problems
}

// tracked is how many connections are to be tracked; 0 leaves it to the kernel.
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

// raise makes a number at least n.
func raise(file string, n int) *KernelProblem {
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

// loadConntrack asks the kernel for its table of connections. The kernel loads
// the module for that by itself, without a modprobe in this container.
func loadConntrack() {
	_, _ = netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
}

// cpus is how many CPUs the machine has, whatever this process may use of
// them.
func cpus() int {
	text, err := readSetting("/sys/devices/system/cpu/online")
	if err != nil {
		return runtime.NumCPU()
	}
	return max(countCPUs(text), 1)
}

// countCPUs reads the kernel's form of a list: "0-3,8".
func countCPUs(list string) int {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, errA := strconv.Atoi(first)
		b, errB := strconv.Atoi(last)
		if errA == nil && errB == nil && b >= a {
			n += b - a + 1
		}
	}
	return n
}
