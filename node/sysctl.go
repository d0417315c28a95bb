// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const sysctlRoot = "/proc/sys"

// Sysctl reads a kernel setting by its path below /proc/sys, such as
// "net/ipv4/ip_forward".
func Sysctl(name string) (string, error) { return readSetting(filepath.Join(sysctlRoot, name)) }

// SetSysctl writes a kernel setting unless it has that value already. So nothing
// fails on a read-only /proc/sys if nothing has to change. impact says what does
// not work without the setting.
func SetSysctl(name, value, impact string) *KernelProblem {
	p := set(filepath.Join(sysctlRoot, name), value)
	if p != nil {
		p.Impact = impact
	}
	return p
}

func readSetting(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading a kernel setting: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func writeSetting(file, value string) error {
	now, err := readSetting(file)
	if err != nil || now == value {
		return err
	}
	if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting %s, which is %s, to %s: %w", nameOf(file), now, value, err)
	}
	return nil
}

// nameOf returns the name for sysctl(8) of a setting below /proc/sys, and the path
// of any other.
func nameOf(file string) string {
	if name, ok := strings.CutPrefix(file, sysctlRoot+"/"); ok {
		return strings.ReplaceAll(name, "/", ".")
	}
	return file
}
