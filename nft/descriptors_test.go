// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"os"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
)

// TestManyOpenFiles writes a table in a process whose low file descriptors are taken.
func TestManyOpenFiles(t *testing.T) {
	nstest.Enter(t)
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
		table, err := Open(FamilyOf(plan.IPv4), "many-open-files", nil)
		if err != nil {
			t.Fatal(err)
		}
		table.ReplaceTable()
		if err := table.Commit(); err != nil {
			t.Fatal(err)
		}
		if err := table.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A connection is told from other sockets of the process, so that one whose low
// descriptor another goroutine took is not used.
func TestDescriptorOfConnection(t *testing.T) {
	nstest.Enter(t)
	socket := func(domain, kind, protocol int) int {
		fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if domain == unix.AF_NETLINK {
			if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				t.Fatal(err)
			}
		}
		return fd
	}
	others := []int{
		socket(unix.AF_INET, unix.SOCK_STREAM, 0),
		socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE),
		socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER),
		selectLimit - 1, // nobody's
	}
	dialed := func() (*nftables.Conn, bool) {
		spare.Lock()
		defer spare.Unlock()
		next, err := freeLow()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := nftables.New(nftables.AsLasting())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.CloseLasting() })
		return conn, isOf(conn, next)
	}
	conn, known := dialed()
	for tries := 0; !known && tries < 100; tries++ { // a goroutine of an earlier test was faster
		conn, known = dialed()
	}
	if !known {
		t.Error("no connection's descriptor is recognised")
	}
	for _, fd := range others {
		if isOf(conn, fd) {
			t.Errorf("%d is taken for its descriptor", fd)
		}
	}
}
