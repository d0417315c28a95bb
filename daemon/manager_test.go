// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestServiceManagerIsNotified plays a service manager for units of Type=notify.
func TestServiceManagerIsNotified(t *testing.T) {
	t.Parallel()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	cmd := exec.Command(build(t), "run", "--source", t.TempDir(), "--mode", "nftables", "--hostname-override", "node1")
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+manager.LocalAddr().String())
	cmd.Stderr = t.Output()
	if err := newLab(t).Host("node1").Start(cmd); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	hear := func(want string) {
		t.Helper()
		manager.SetReadDeadline(time.Now().Add(hangTimeout))
		b := make([]byte, 4096)
		n, err := manager.Read(b)
		if got := string(b[:max(n, 0)]); err != nil || got != want {
			t.Fatalf("the service manager got %q, %v, want %q", got, err, want)
		}
	}
	hear("READY=1")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	hear("STOPPING=1")
}
