// SPDX-License-Identifier: Apache-2.0

package nft

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// The library waits for answers with select(2). It panics with file descriptors from 1024
// on, for which select cannot wait. A process that relays connections has many more files
// open, so a few low descriptors are reserved for the library.

// selectLimit is FD_SETSIZE.
const selectLimit = 1024

// keptFiles is how many descriptors are reserved. A process has two or three connections
// for each family and mode; the contract suite has many at once.
const keptFiles = 64

var spare struct {
	sync.Mutex
	files []*os.File
}

func init() { keepSpare() }

// keepSpare reserves low descriptors until there are enough.
func keepSpare() {
	for len(spare.files) < keptFiles {
		f, err := os.Open(os.DevNull)
		if err != nil {
			return
		}
		if f.Fd() >= selectLimit {
			f.Close()
			return
		}
		spare.files = append(spare.files, f)
	}
}

// dial opens a lasting connection with a descriptor for which the library can wait.
func dial(opts ...nftables.ConnOption) (*nftables.Conn, error) {
	opts = append(opts, nftables.AsLasting())
	spare.Lock()
	defer spare.Unlock()
	for {
		next, err := freeLow()
		if err != nil {
			return nil, err
		}
		conn, err := nftables.New(opts...)
		if err != nil || conn.TestDial != nil || isOf(conn, next) {
			return conn, err
		}
		// Another goroutine was faster to take the descriptor.
		if err := conn.CloseLasting(); err != nil && !errors.Is(err, os.ErrClosed) {
			return nil, err
		}
	}
}

// freeLow returns the descriptor that the kernel assigns next, which is the lowest free
// one. If it is too high, a reserved descriptor becomes free.
func freeLow() (int, error) {
	low, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	next := int(low.Fd())
	low.Close()
	last := len(spare.files) - 1
	switch {
	case next < selectLimit:
		return next, nil
	case last < 0:
		return 0, fmt.Errorf("%w: none below %d is left for nf_tables", unix.EMFILE, selectLimit)
	}
	f := spare.files[last]
	spare.files = spare.files[:last]
	next = int(f.Fd())
	return next, f.Close()
}

// isOf says whether a descriptor is that of a connection. The library does not tell it,
// but the kernel's number of the socket in its network namespace does.
func isOf(conn *nftables.Conn, fd int) bool {
	port, err := conn.GetPortID()
	if err != nil {
		return false
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || protocol != unix.NETLINK_NETFILTER {
		return false
	}
	addr, err := unix.Getsockname(fd)
	at, isNetlink := addr.(*unix.SockaddrNetlink)
	return err == nil && isNetlink && at.Pid == port && isHere(fd)
}

// isHere says whether a socket is in the network namespace of the calling thread, if the
// kernel can tell (5.14).
func isHere(fd int) bool {
	namespace, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return true
	}
	own, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return false
	}
	defer unix.Close(own)
	here, err := unix.GetsockoptUint64(own, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return err == nil && here == namespace
}

// refill reserves the descriptor that a closed connection had.
func refill() {
	spare.Lock()
	defer spare.Unlock()
	keepSpare()
}
