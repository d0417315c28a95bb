// SPDX-License-Identifier: Apache-2.0

// Command signalbox makes Kubernetes Services work on a node, in the place of
// kube-proxy.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// The names of other programs that this one is called by.
const (
	asKubeProxy = "kube-proxy"
	asGoRunner  = "go-runner"
)

// calledAs is the name of the program that a command line begins with.
func calledAs(arg0 string) string { return filepath.Base(arg0) }

func main() {
	if calledAs(os.Args[0]) == asGoRunner {
		os.Exit(goRunner(os.Args[1:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Whoever asks twice does not want to wait for open connections.
	context.AfterFunc(ctx, stop)
	err := rootCommand().ExecuteContext(ctx)
	var status exitStatus
	switch {
	case errors.As(err, &status):
		os.Exit(int(status))
	case err != nil:
		fmt.Fprintln(os.Stderr, "signalbox:", err)
		os.Exit(1)
	}
}
