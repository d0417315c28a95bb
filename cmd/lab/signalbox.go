// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/pflag"

	"signalbox/internal/testbed"
)

// checkModes checks the values of --mode and --kube-proxy-mode.
func checkModes(signalbox, kubeProxy []string) error {
	return errors.Join(
		testbed.CheckModes("--mode", signalbox, testbed.Modes),
		testbed.CheckModes("--kube-proxy-mode", kubeProxy, testbed.KubeProxyModes),
	)
}

// addSignalboxFlag gives a command the flag that names the signalbox to run.
func addSignalboxFlag(fs *pflag.FlagSet, path *string) {
	fs.StringVar(path, "signalbox", "", "the signalbox binary to run (default: the one beside this program, else the one in PATH)")
}

// findSignalbox returns the path of the signalbox to run: the named one, else the
// one in this program's directory, else the one in PATH.
func findSignalbox(named string) (string, error) {
	if named != "" {
		path, err := exec.LookPath(named)
		if err != nil {
			return "", fmt.Errorf("--signalbox=%s: %w", named, err)
		}
		return path, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding this program's own directory: %w", err)
	}
	dir := filepath.Dir(self)
	for _, candidate := range []string{filepath.Join(dir, "signalbox"), "signalbox"} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no signalbox in %s or PATH: build it with make build, or name it with --signalbox", dir)
}
