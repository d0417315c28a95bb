package nftables

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// TestManyOpenFiles syncs in a process whose low file descriptors are taken.
func TestManyOpenFiles(t *testing.T) {
	inNamespace(t)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Max < 2*selectLimit {
		t.Skip("RLIMIT_NOFILE is too low for this test")
	}
	for last := uintptr(0); last < selectLimit; {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		last = f.Fd()
	}
	for range 2 * keptFiles {
		p := newProxier(t, proxier.IPv4)
		if err := p.Sync(t.Context(), &proxier.Plan{Family: proxier.IPv4}, proxier.Change{All: true}); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
