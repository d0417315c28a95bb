// SPDX-License-Identifier: Apache-2.0

package nodelock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"signalbox/internal/namespace"
	"signalbox/internal/rootonly"
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

// lockFile is the file in the directory of which a byte is locked.
const lockFile = "node-locks"

// errHeld says that another process has the place.
var errHeld = errors.New("another process holds the node lock")

// heldPlace is a place that this process has.
type heldPlace struct {
	listener *net.UnixListener
	socket   io.Closer // closes the listener, and removes its file
	file     *os.File  // a byte is locked as long as it is open; nil for the abstract socket
}

func (p *heldPlace) release() {
	p.socket.Close()
	if p.file != nil {
		p.file.Close()
	}
}

func listenAbstract(name string) (*heldPlace, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errHeld
	}
	if err != nil {
		return nil, err
	}
	return &heldPlace{listener: l, socket: l}, nil
}

func socketPath(dir string, id namespace.ID) string {
	return filepath.Join(dir, fmt.Sprintf("net-%d-lock.sock", id.Inode))
}

// listenIn locks the namespace's byte of the file. The kernel unlocks it when its process
// ends, also by a signal. The socket of such a process is left, and replaced.
func listenIn(dir string, id namespace.ID) (*heldPlace, error) {
	if err := rootonly.MakeDir(dir); err != nil {
		return nil, err
	}
	file, err := lockByte(filepath.Join(dir, lockFile), int64(id.Inode))
	if err != nil {
		return nil, err
	}
	socket, err := rootonly.Listen(socketPath(dir, id))
	if err != nil {
		file.Close()
		return nil, err
	}
	return &heldPlace{listener: socket.UnixListener, socket: socket, file: file}, nil
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

// isTransient says whether the process or the node lacks descriptors or memory. A place
// may be free later.
func isTransient(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM)
}
