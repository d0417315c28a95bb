package userspace

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"signalbox/node"
)

// namespace is a network namespace to open sockets in. A daemon has but one,
// and then entering it is nothing but a call.
type namespace struct {
	file *os.File // nil: every thread of the process is in it
}

const threadNamespace = "/proc/thread-self/ns/net"

// currentNamespace is that of the calling thread.
func currentNamespace() (*namespace, error) {
	ns, err := node.ForeignNamespace()
	if err != nil {
		return nil, fmt.Errorf("which network namespace this is: %w", err)
	}
	if !ns.IsOpen() {
		return &namespace{}, nil
	}
	return &namespace{file: os.NewFile(uintptr(ns), threadNamespace)}, nil
}

// do calls fn in the namespace.
func (n *namespace) do(fn func()) error {
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

func (n *namespace) close() {
	if n.file != nil {
		n.file.Close()
	}
}
