// SPDX-License-Identifier: Apache-2.0

// Command lab shows signalbox at work in a lab of network namespaces on this
// machine. It runs the signalbox binary; the daemon needs nothing of it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The second Ctrl-C ends the program at once.
	context.AfterFunc(ctx, stop)
	// A closed terminal may signal again and must not prevent the cleanup.
	ctx, stopHangup := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stopHangup()
	// SIGPIPE also tells of a lab's connection whose other side is gone. A closed pipe at
	// the output shows when something is written, and must not prevent the cleanup.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, unread := context.WithCancel(ctx)
	defer unread()
	root := rootCommand()
	root.SetOut(output{os.Stdout, unread})
	root.SetErr(output{os.Stderr, unread})
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

// output ends the program when nobody can read what it writes.
type output struct {
	io.Writer
	unread func()
}

func (o output) Write(b []byte) (int, error) {
	n, err := o.Writer.Write(b)
	if err != nil {
		o.unread()
	}
	return n, err
}
