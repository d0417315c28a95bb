// SPDX-License-Identifier: Apache-2.0

package rootonly

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"
)

// Listener is a Unix socket at a path.
type Listener struct {
	*net.UnixListener
	path string
	file fs.FileInfo // at path
}

// Listen replaces the socket at a path. A process that serves there now, or did, gets no
// further connections.
func Listen(path string) (*Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	file, err := os.Lstat(path)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &Listener{l, path, file}, nil
}

// Accept accepts connections of root and of this process's own user.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if CheckPeer(c) == nil {
			return c, nil
		}
		c.Close()
	}
}

// Lost says whether clients reach no process at the path: the socket has been removed, or
// a process has replaced it and ended.
func (l *Listener) Lost() bool {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.file) {
		return false
	}
	c, err := net.Dial("unix", l.path)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// Close removes the socket, but leaves the socket of a process that has replaced it.
func (l *Listener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.file) {
		_ = os.Remove(l.path) // the next process removes it otherwise
	}
	return l.UnixListener.Close()
}
