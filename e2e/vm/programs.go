// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// programs adds programs of this machine with the libraries that they load.
func (t tree) programs(ctx context.Context, names []string) error {
	var files []string
	for _, name := range names {
		file, err := lookProgram(name)
		if err != nil {
			return err
		}
		files = append(files, file)
	}
	libraries, err := t.withLibraries(ctx, files)
	if err != nil {
		return err
	}
	// iptables opens its matches and targets by name, from a directory beside
	// its library; ldd does not know of them.
	i := slices.IndexFunc(libraries, func(l string) bool { return strings.HasPrefix(filepath.Base(l), "libxtables.so") })
	if i < 0 {
		return nil
	}
	plugins, err := filepath.Glob(filepath.Join(filepath.Dir(libraries[i]), "xtables", "*.so"))
	if err != nil {
		return err
	}
	if len(plugins) == 0 {
		return fmt.Errorf("no xtables plugins beside %s", libraries[i])
	}
	_, err = t.withLibraries(ctx, plugins)
	return err
}

func (t tree) withLibraries(ctx context.Context, files []string) ([]string, error) {
	libraries, err := ldd(ctx, files)
	if err != nil {
		return nil, err
	}
	for _, f := range slices.Concat(files, libraries) {
		if err := t.same(f); err != nil {
			return nil, err
		}
	}
	return libraries, nil
}

// lookProgram finds a program also where only root's PATH leads.
func lookProgram(name string) (string, error) {
	if file, err := exec.LookPath(name); err == nil {
		return filepath.Abs(file)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if file, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("this machine has no program %s to take into the virtual one", name)
}

// ldd returns the libraries that files load, the loader included.
func ldd(ctx context.Context, files []string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "ldd", files...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) { // it fails where one file is static
		return nil, fmt.Errorf("ldd: %w", err)
	}
	if strings.Contains(string(out), "not found") {
		return nil, fmt.Errorf("ldd: %s%s", out, stderr.Bytes())
	}
	return libraryPaths(string(out)), nil
}

// libraryPaths reads lines like "libm.so.6 => /lib/libm.so.6 (0x7f...)" and
// "/lib64/ld-linux-x86-64.so.2 (0x7f...)".
func libraryPaths(text string) []string {
	var paths []string
	for line := range strings.Lines(text) {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") && !strings.HasSuffix(word, ":") {
				paths = append(paths, word)
			}
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}
