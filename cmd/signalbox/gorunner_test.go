// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestGoRunner(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kube-proxy.log")
	const speak = "echo out; echo err >&2; exit $1"
	for _, test := range []struct {
		args []string
		code int
		log  string
	}{
		{[]string{"--log-file=" + file, "--also-stdout", "/bin/sh", "-c", speak, "sh", "3"}, 3, "out\nerr\n"},
		{[]string{"--log-file=" + file, "--also-stdout=true", "--", "/bin/sh", "-c", speak, "sh", "0"}, 0, "out\nerr\n"},
		{[]string{"-log-file", file, "sh", "-c", speak, "sh", "0"}, 0, "out\nerr\n"},
		{[]string{"--log-file=" + file, "--redirect-stderr=false", "sh", "-c", speak, "sh", "0"}, 0, "out\n"},
		{[]string{"sh", "-c", "kill -9 $$"}, 137, ""},
		{[]string{"--log-file=" + file}, 1, ""},
		{[]string{"--log-file=" + filepath.Join(file, "no"), "true"}, 1, ""},
		{[]string{"/no/such/program"}, 1, ""},
		{[]string{"--magic", "true"}, 1, ""},
	} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		code := goRunner(test.args)
		log, err := os.ReadFile(file)
		if code != test.code || err != nil || string(log) != test.log {
			t.Errorf("%q: code %d, log %q, %v; want %d and %q", test.args, code, log, err, test.code, test.log)
		}
	}
}

// The container is told to end by its first process alone.
func TestGoRunnerForwardsSignals(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(file, 0o600); err != nil { // so that the output can be waited for
		t.Fatal(err)
	}
	code := make(chan int, 1)
	go func() {
		code <- goRunner([]string{"--log-file=" + file, "sh", "-c", "trap 'echo told; exit 7' TERM; echo ready; while :; do sleep 0.01; done"})
	}()
	log, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if line, err := bufio.NewReader(log).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the program says %q, %v", line, err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := <-code; got != 7 {
		t.Errorf("code %d", got)
	}
}
