// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	maxFile  = "sys/net/netfilter/nf_conntrack_max"
	hashFile = "module/nf_conntrack/parameters/hashsize"
)

func timeoutFile(name string) string { return "sys/net/netfilter/nf_conntrack_" + name }

// kernelDefaults are the settings of a kernel with a gigabyte of memory.
var kernelDefaults = map[string]string{
	maxFile: "65536", hashFile: "65536",
	timeoutFile("tcp_timeout_established"): "432000",
	timeoutFile("tcp_timeout_close_wait"):  "60",
	timeoutFile("tcp_be_liberal"):          "0",
	timeoutFile("udp_timeout"):             "30",
	timeoutFile("udp_timeout_stream"):      "120",
}

// fakeKernel has the settings as files.
func fakeKernel(t *testing.T, settings map[string]string) (kernelFiles, string) {
	t.Helper()
	root := t.TempDir()
	for name, value := range settings {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return kernelFiles{sysctls: filepath.Join(root, "sys"), modules: filepath.Join(root, "module"), load: func() {}}, root
}

func TestTuneConntrack(t *testing.T) {
	kubeProxy := Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablishedTimeout: 24 * time.Hour, TCPCloseWaitTimeout: time.Hour}
	for name, test := range map[string]struct {
		want    Conntrack
		cpus    int
		before  map[string]string
		changed map[string]string
	}{
		"kube-proxy's defaults": {want: kubeProxy, cpus: 2, changed: map[string]string{
			maxFile:                                "131072",
			timeoutFile("tcp_timeout_established"): "86400",
			timeoutFile("tcp_timeout_close_wait"):  "3600",
		}},
		"many CPUs": {want: Conntrack{MaxPerCore: 32768, Min: 131072}, cpus: 16, changed: map[string]string{maxFile: "524288", hashFile: "131072"}},
		"more CPUs than the cap allows": {want: Conntrack{MaxPerCore: 32768, Min: 2 << 20}, cpus: 128, changed: map[string]string{
			maxFile: "1048576", hashFile: "262144",
		}},
		"a minimum above the cap":   {want: Conntrack{MaxPerCore: 1, Min: 2 << 20}, cpus: 4, changed: map[string]string{maxFile: "2097152", hashFile: "524288"}},
		"nothing per core":          {want: Conntrack{Min: 2 << 20}, cpus: 4},
		"nothing at all":            {cpus: 4},
		"a higher value stays":      {want: Conntrack{MaxPerCore: 32768}, cpus: 4, before: map[string]string{maxFile: "4194304", hashFile: "1048576"}},
		"the right value stays":     {want: Conntrack{MaxPerCore: 16384}, cpus: 4},
		"liberal and UDP time-outs": {want: Conntrack{TCPBeLiberal: true, UDPTimeout: 1500 * time.Millisecond, UDPStreamTimeout: 5 * time.Minute}, changed: map[string]string{timeoutFile("tcp_be_liberal"): "1", timeoutFile("udp_timeout"): "2", timeoutFile("udp_timeout_stream"): "300"}},
		"not liberal":               {before: map[string]string{timeoutFile("tcp_be_liberal"): "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := maps.Clone(kernelDefaults)
			maps.Copy(before, test.before)
			k, root := fakeKernel(t, before)
			if problems := k.tuneConntrack(test.want, test.cpus); len(problems) != 0 {
				t.Errorf("problems: %v", problems)
			}
			want := maps.Clone(before)
			maps.Copy(want, test.changed)
			for file, value := range want {
				if got, err := readSetting(filepath.Join(root, file)); got != value || err != nil {
					t.Errorf("%s is %s, %v; want %s", file, got, err, value)
				}
			}
		})
	}
}

// readOnly makes a setting one that even root cannot write: ngroups_max, which
// is 65536.
func readOnly(t *testing.T, file string) {
	t.Helper()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/sys/kernel/ngroups_max", file); err != nil {
		t.Fatal(err)
	}
}

// What cannot be written is named, and the rest is written.
func TestReadOnlyConntrackSettings(t *testing.T) {
	k, root := fakeKernel(t, kernelDefaults)
	readOnly(t, filepath.Join(root, maxFile))
	readOnly(t, filepath.Join(root, hashFile))
	problems := k.tuneConntrack(Conntrack{MaxPerCore: 131072, UDPTimeout: time.Minute}, 4)
	if len(problems) != 2 {
		t.Fatalf("problems are %v, want two", problems)
	}
	for i, want := range []struct{ file, wanted string }{{maxFile, "524288"}, {hashFile, "131072"}} {
		p := problems[i]
		if p.File != filepath.Join(root, want.file) || p.Wanted != want.wanted || p.Found != "65536" || !errors.Is(p, fs.ErrPermission) ||
			!strings.Contains(p.Error(), want.wanted) || !strings.Contains(p.Remedy(), "--init-only") {
			t.Errorf("problem %d is %q with the remedy %q", i, p, p.Remedy())
		}
	}
	if got, err := readSetting(filepath.Join(root, timeoutFile("udp_timeout"))); got != "60" || err != nil {
		t.Errorf("the setting after them is %s, %v", got, err)
	}
	if problems := k.tuneConntrack(Conntrack{MaxPerCore: 16384}, 4); len(problems) != 0 {
		t.Errorf("settings that need no writing: %v", problems)
	}
}

// A kernel without connection tracking is asked to load it.
func TestConntrackIsLoaded(t *testing.T) {
	k, root := fakeKernel(t, map[string]string{"sys/kernel/ostype": "Linux"})
	problems := k.tuneConntrack(Conntrack{MaxPerCore: 1, Min: 131072}, 1)
	if len(problems) != 2 || !slices.ContainsFunc(problems, func(p *KernelProblem) bool {
		return errors.Is(p, fs.ErrNotExist) && strings.Contains(p.Remedy(), "nf_conntrack")
	}) {
		t.Errorf("never loaded: %v", problems)
	}
	k.load = func() {
		for name, value := range kernelDefaults {
			file := filepath.Join(root, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(value), 0o644)); err != nil {
				t.Error(err)
			}
		}
	}
	if problems := k.tuneConntrack(Conntrack{MaxPerCore: 1, Min: 131072}, 1); len(problems) != 0 {
		t.Errorf("loaded on demand: %v", problems)
	}
}

// Raising the own score needs no privilege, and is what a test can undo.
func TestOOMScore(t *testing.T) {
	const file = "/proc/self/oom_score_adj"
	before, err := readSetting(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(file, []byte(before), 0o644); err != nil {
			t.Error(err)
		}
	}()
	if p := SetOOMScore(1000); p != nil {
		t.Fatal(p)
	}
	if now, err := readSetting(file); now != "1000" || err != nil {
		t.Errorf("the score is %s, %v", now, err)
	}
	if p := SetOOMScore(1001); p == nil || p.Wanted != "1001" || !strings.Contains(p.Remedy(), "--oom-score-adj (oomScoreAdj in a file) to 1000 or more") {
		t.Errorf("a score that the kernel refuses: %v", p)
	}
}
