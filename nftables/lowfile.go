package nftables

import (
	"errors"
	"fmt"
	"os"
	"sync"

	nft "github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// The library waits for answers with select(2), which cannot wait for file
// descriptors from 1024 on, and panics there. A process that relays connections
// has many more files open; so a few low descriptors are kept back for it.

// selectLimit is FD_SETSIZE.
const selectLimit = 1024

// plentyBelow is the descriptor below which other goroutines cannot use up the
// rest between a look and the next descriptor that the kernel gives.
const plentyBelow = selectLimit / 2

// keptFiles is how many descriptors are kept back.
const keptFiles = 16

var spare struct {
	sync.Mutex
	files []*os.File
}

func init() { keepSpare() }

// keepSpare fills up what is kept back, from low descriptors only.
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

// dialLow opens a lasting connection with a descriptor that the library can
// wait for.
func dialLow(opts ...nft.ConnOption) (*nft.Conn, error) {
	opts = append(opts, nft.AsLasting())
	spare.Lock()
	defer spare.Unlock()
	for {
		low, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		// The kernel gives the lowest descriptor that is free.
		next := low.Fd()
		low.Close()
		if next < plentyBelow || next < selectLimit && len(spare.files) == 0 {
			return nft.New(opts...)
		}
		if len(spare.files) == 0 {
			return nil, fmt.Errorf("%w: none below %d is left for nf_tables", unix.EMFILE, selectLimit)
		}
		f := spare.files[len(spare.files)-1]
		spare.files = spare.files[:len(spare.files)-1]
		number := int(f.Fd())
		f.Close()
		conn, err := nft.New(opts...)
		if err != nil || isNetlink(number) {
			return conn, err
		}
		// Another goroutine was faster to take the descriptor.
		if err := conn.CloseLasting(); err != nil && !errors.Is(err, os.ErrClosed) {
			return nil, err
		}
	}
}

func isNetlink(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_NETLINK
}

// refill keeps back again what a closed connection has freed.
func refill() {
	spare.Lock()
	defer spare.Unlock()
	keepSpare()
}
