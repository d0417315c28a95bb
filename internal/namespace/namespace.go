// SPDX-License-Identifier: Apache-2.0

// Package namespace identifies network namespaces.
package namespace

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// ID identifies a network namespace as long as a process or a socket is in it.
type ID struct{ Device, Inode uint64 }

// Current returns the network namespace of the calling thread.
func Current() (ID, error) {
	var s unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &s); err != nil {
		return ID{}, fmt.Errorf("find this thread's network namespace: %w", err)
	}
	return ID{s.Dev, s.Ino}, nil
}

// OfSocket returns the network namespace of a socket. The kernel tells it to a process
// with CAP_NET_ADMIN there (SIOCGSKNS, Linux 4.9).
func OfSocket(socket int) (ID, error) {
	fd, err := unix.IoctlRetInt(socket, unix.SIOCGSKNS)
	if err != nil {
		return ID{}, fmt.Errorf("find the network namespace of a socket: %w", err)
	}
	defer unix.Close(fd)
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		return ID{}, fmt.Errorf("find the network namespace of a socket: %w", err)
	}
	return ID{s.Dev, s.Ino}, nil
}
