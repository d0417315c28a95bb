// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	// Package and Version are those of the Debian package with the kernel.
	Package, Version string
	// Release is what uname -r prints in the machine.
	Release string
	// Image is the path of the bootable kernel.
	Image string
	// Modules is the directory of its modules.
	Modules string
}

// DefaultKernel is the package of the kernel that machines have unless told
// otherwise: the newest one of the distribution.
const DefaultKernel = "linux-image-cloud-amd64"

// FetchKernel downloads a kernel package, or the newest one that a metapackage
// stands for, and unpacks it below cache, unless that has been done. Nothing is
// installed.
func FetchKernel(ctx context.Context, cache, name string) (*Kernel, error) {
	k, err := fetch(ctx, cache, name)
	if err == nil {
		return k, nil
	}
	// The package lists may be missing, or older than what the mirror has.
	if out, err := exec.CommandContext(ctx, "apt-get", "update", "-qq").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("apt-get update: %w: %s", err, out)
	}
	return fetch(ctx, cache, name)
}

func fetch(ctx context.Context, cache, name string) (*Kernel, error) {
	k, err := candidate(ctx, name)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, k.Package+"_"+k.Version)
	if _, err := os.Stat(dir); err != nil {
		if err := k.unpack(ctx, cache, dir); err != nil {
			return nil, fmt.Errorf("kernel %s %s: %w", k.Package, k.Version, err)
		}
	}
	return k, k.find(dir)
}

var kernelDependency = regexp.MustCompile(`(?m)^Depends:.*?\b(linux-image-[^ ,]+)`)

// candidate asks apt which version of a package it would install.
func candidate(ctx context.Context, name string) (*Kernel, error) {
	cmd := exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("apt-cache show %s: %w: %s", name, err, stderr.Bytes())
	}
	if m := kernelDependency.FindSubmatch(out); m != nil {
		return candidate(ctx, string(m[1])) // name is a metapackage
	}
	for line := range strings.Lines(string(out)) {
		if version, ok := strings.CutPrefix(line, "Version: "); ok {
			return &Kernel{Package: name, Version: strings.TrimSpace(version)}, nil
		}
	}
	return nil, fmt.Errorf("apt-cache show %s: no version in\n%s", name, out)
}

// unpack works beside dir and renames, so that an interrupted one leaves
// nothing that looks finished.
func (k *Kernel) unpack(ctx context.Context, cache, dir string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	part, err := os.MkdirTemp(cache, "part")
	if err != nil {
		return err
	}
	defer os.RemoveAll(part)
	run := func(name string, args ...string) error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = part
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out)
		}
		return nil
	}
	if err := run("apt-get", "download", "-q", k.Package+"="+k.Version); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(part, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %q (%v)", debs, err)
	}
	root := filepath.Join(part, "root")
	if err := run("dpkg-deb", "-x", debs[0], root); err != nil {
		return err
	}
	// Later releases compress their modules, which not every kernel can undo
	// without kmod.
	if err := run("find", root, "-name", "*.ko.xz", "-exec", "xz", "-d", "{}", "+"); err != nil {
		return err
	}
	err = os.Rename(root, dir)
	if errors.Is(err, os.ErrExist) {
		return nil // another test was quicker
	}
	return err
}

// find fills in the paths below dir.
func (k *Kernel) find(dir string) error {
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("%s holds the kernels %q, not one (%v)", dir, images, err)
	}
	k.Image = images[0]
	k.Release = strings.TrimPrefix(filepath.Base(k.Image), "vmlinuz-")
	for _, lib := range []string{"lib", "usr/lib"} {
		k.Modules = filepath.Join(dir, lib, "modules", k.Release)
		if _, err := os.Stat(k.Modules); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s has no modules of %s", dir, k.Release)
}
