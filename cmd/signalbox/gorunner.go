// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

// goRunner runs a program whose output goes to a file, and returns its exit code. It
// is the program go-runner of kube-proxy's images, by which kOps, for example,
// starts kube-proxy.
func goRunner(args []string) int {
	code, err := runLogged(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", asGoRunner, err)
		return 1
	}
	return code
}

func runLogged(args []string) (code int, err error) {
	flags := flag.NewFlagSet(asGoRunner, flag.ContinueOnError)
	file := flags.String("log-file", "", "append the program's output to this file")
	alsoStdout := flags.Bool("also-stdout", false, "with --log-file, write it to standard output too")
	redirectStderr := flags.Bool("redirect-stderr", true, "treat standard error as standard output")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	if flags.NArg() == 0 {
		return 0, errors.New("no program is named: give it and its arguments after the flags")
	}
	cmd := exec.Command(flags.Arg(0), flags.Args()[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if *file != "" {
		log, err := os.OpenFile(*file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return 0, fmt.Errorf("--log-file: %w", err)
		}
		defer log.Close()
		cmd.Stdout = log
		if *alsoStdout {
			cmd.Stdout = io.MultiWriter(os.Stdout, log)
		}
	}
	if *redirectStderr {
		cmd.Stderr = cmd.Stdout
	}
	return runForwarding(cmd)
}

// runForwarding runs a program, which gets the signals that this one is sent.
func runForwarding(cmd *exec.Cmd) (code int, err error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = cmd.Process.Signal(s) // fails only once it has ended
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				// A shell's code for a program that a signal ended.
				if status := exit.Sys().(syscall.WaitStatus); status.Signaled() {
					return 128 + int(status.Signal()), nil
				}
				return exit.ExitCode(), nil
			}
			return 0, err
		}
	}
}
