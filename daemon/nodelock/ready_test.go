// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// askedLock names the lock that TestReadyElsewhere asks for in a process of its own.
const askedLock = "SIGNALBOX_TEST_LOCK"

// The holder of the lock is ready, and the question changes nothing.
func TestReady(t *testing.T) {
	s := locksFor(t)()
	if _, err := ready("", s.abstract); err == nil || !strings.Contains(err.Error(), "no signalbox serves") {
		t.Errorf("before the lock is acquired: %v", err)
	}
	if err := s.Acquire(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	s.log = slog.New(slog.NewTextHandler(&log, nil))
	var conditions atomic.Pointer[[]string]
	s.conditions = func() []string { return *conditions.Load() }
	waiting := make(chan *Contender, 1)
	go func() { waiting <- s.NextContender(t.Context()) }()
	for want, now := range map[string][]string{
		"": nil, "a.yaml: document 1: no\nno Node object\n": {"a.yaml: document 1: no", "no Node\nobject"},
	} {
		conditions.Store(&now)
		got, err := ready("", s.abstract)
		if err != nil || strings.Join(got, "") != want {
			t.Errorf("the conditions are %q, %v; want %q", got, err, want)
		}
	}

	elsewhere := exec.Command(os.Args[0], "-test.run=^TestReadyElsewhere$", "-test.v")
	elsewhere.Env = append(os.Environ(), askedLock+"="+s.abstract)
	elsewhere.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	said, err := elsewhere.CombinedOutput()
	if err != nil || !strings.Contains(string(said), "a signalbox of another container still serves") {
		t.Errorf("in another PID namespace: %v\n%s", err, said)
	}

	next := &Lock{abstract: s.abstract, log: s.log, handoverTimeout: s.handoverTimeout, requestTimeout: s.requestTimeout}
	t.Cleanup(next.Release)
	taken := make(chan error, 1)
	go func() { taken <- next.Acquire(t.Context(), "") }()
	if err := s.HandOver(<-waiting); err != nil {
		t.Error(err)
	}
	if err := <-taken; err != nil {
		t.Error(err)
	}
	if strings.Contains(log.String(), "WARN") {
		t.Errorf("a question is a warning in the log:\n%s", &log)
	}
}

// TestReadyElsewhere is the part of TestReady that runs in another PID
// namespace.
func TestReadyElsewhere(t *testing.T) {
	if name := os.Getenv(askedLock); name != "" {
		_, err := ready("", name)
		t.Log(err)
	}
}
