// SPDX-License-Identifier: Apache-2.0

package nstest

import (
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// NoDescriptors keeps the whole process from opening files and sockets until the
// returned function is called, or the test ends. Open ones go on working.
func NoDescriptors(t testing.TB) (restore func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	restore = sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(restore)
	return restore
}
