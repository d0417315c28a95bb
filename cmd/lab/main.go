// Command lab shows signalbox at work in a lab of network namespaces on this
// machine. It runs the signalbox binary; the daemon needs nothing of it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The second Ctrl-C ends the program at once.
	context.AfterFunc(ctx, stop)
	// A closed terminal or pipe may signal again and must not prevent the cleanup.
	ctx, stopHangup := signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGPIPE)
	defer stopHangup()
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}
