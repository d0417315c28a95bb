// SPDX-License-Identifier: Apache-2.0

package tcprelay

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"signalbox/node"
)

// Namespace is a network namespace to open sockets in. A daemon has but one,
// and then entering it is nothing but a call.
type Namespace struct {
	file *os.File // nil: every thread of the process is in it
}

const threadNamespace = "/proc/thread-self/ns/net"

// CurrentNamespace is that of the calling thread.
func CurrentNamespace() (*Namespace, error) {
	ns, err := node.ForeignNamespace()
	if err != nil {
		return nil, fmt.Errorf("which network namespace this is: %w", err)
	}
	if !ns.IsOpen() {
		return &Namespace{}, nil
	}
	return &Namespace{file: os.NewFile(uintptr(ns), threadNamespace)}, nil
}

// Do calls fn in the namespace.
func (n *Namespace) Do(fn func()) error {
	if n.file == nil {
		fn()
		return nil
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open(threadNamespace)
		if err == nil {
			defer home.Close()
			err = unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			fn()
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			} // otherwise the thread ends with the goroutine
		}
		done <- err
	}()
	return <-done
}

// Close lets go of the namespace.
func (n *Namespace) Close() {
	if n.file != nil {
		n.file.Close()
	}
}
