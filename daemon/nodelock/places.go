// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"signalbox/internal/namespace"
)

// This file knows the two places of the lock.
//
// The first is a socket in the directory of --run-dir, and a byte of a locked file
// beside it. Only root can enter that, so no other user can take the place first.
//
// The second is an abstract Unix socket. Each network namespace has one, as it has one
// set of kernel tables. It serves processes that do not share the directory: containers
// without it, and versions before 2026-12, which have no other place. Any user can take
// its name, so a process that has the first place serves without the second.

const abstractName = "@signalbox-serves-this-node"

// errHeld says that another process has the place.
var errHeld = errors.New("another process holds the node lock")

// heldPlace is a place that this process has.
type heldPlace struct {
	listener *net.UnixListener
	file     *os.File // a byte is locked as long as it is open; nil for the abstract socket
}

func (p *heldPlace) release() {
	p.listener.Close() // and removes the socket
	if p.file != nil {
		p.file.Close()
	}
}

func listenAbstract(name string) (*heldPlace, error) {
	l, err := listenUnix(name)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errHeld
	}
	if err != nil {
		return nil, err
	}
	return &heldPlace{listener: l}, nil
}

func socketPath(dir string, id namespace.ID) string {
	return filepath.Join(dir, fmt.Sprintf("net-%d-lock.sock", id.Inode))
}

// listenIn locks the namespace's byte of the file. The kernel unlocks it when its process
// ends, also by a signal. The socket of such a process is left, and replaced.
func listenIn(dir string, id namespace.ID) (*heldPlace, error) {
	file, err := lockByte(filepath.Join(dir, "node-locks"), int64(id.Inode))
	if err != nil {
		return nil, err
	}
	path := socketPath(dir, id)
	if err = os.Remove(path); err == nil || errors.Is(err, fs.ErrNotExist) {
		var l *net.UnixListener
		if l, err = listenUnix(path); err == nil {
			return &heldPlace{listener: l, file: file}, nil
		}
	}
	file.Close()
	return nil, err
}

// lockByte returns a file of which one byte is locked until it is closed.
func lockByte(name string, at int64) (*os.File, error) {
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1})
	if err == nil {
		return file, nil
	}
	file.Close()
	if errors.Is(err, unix.EAGAIN) {
		return nil, errHeld
	}
	return nil, fmt.Errorf("locking byte %d of %s: %w", at, name, err)
}

func listenUnix(address string) (*net.UnixListener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
}
