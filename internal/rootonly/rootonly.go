// SPDX-License-Identifier: Apache-2.0

// Package rootonly keeps other users of the machine away from the sockets and files of
// signalbox: only root and the process's own user may use them.
package rootonly

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

var errOtherUser = errors.New("it belongs to another user")

// Peer returns the credentials of the other side of a connection.
func Peer(c *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(controlErr, err)
}

// Check returns an error unless the credentials are of root or of this process's own user.
func Check(cred *unix.Ucred) error {
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %d", errOtherUser, cred.Uid)
	}
	return nil
}

// CheckPeer returns an error unless the other side is of root or of this process's own
// user.
func CheckPeer(c *net.UnixConn) error {
	cred, err := Peer(c)
	if err != nil {
		return err
	}
	return Check(cred)
}

// ownFiles are patterns for the names of signalbox's files in --run-dir and --state-dir. A file
// system of its own has lost+found, which only root may enter.
var ownFiles = []string{"net-*.sock", "node-locks", "*.state", "*.state.*", "lost+found"}

// MakeDir makes a directory that no other user may enter. It closes an existing directory
// to other users if that is empty, or has files of signalbox only. The kubelet and systemd
// make such directories with mode 0755. Other programs use /run or /var/lib: closing those
// would stop them.
func MakeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; !info.IsDir() || int(owner) != os.Geteuid() {
		return fmt.Errorf("%s is not a directory of user %d", dir, os.Geteuid())
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if !isOwn(f.Name()) {
			return fmt.Errorf("other users may enter %s, and %s in it is not a file of signalbox: name a directory that only signalbox uses, or change the mode to 0700", dir, f.Name())
		}
	}
	return os.Chmod(dir, 0o700)
}

func isOwn(name string) bool {
	return slices.ContainsFunc(ownFiles, func(pattern string) bool {
		own, _ := filepath.Match(pattern, name) // fails only for a wrong pattern
		return own
	})
}
