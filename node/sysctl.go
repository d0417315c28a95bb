package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const sysctlRoot = "/proc/sys"

// Sysctl reads a kernel setting, named with slashes as below /proc/sys:
// "net/ipv4/ip_forward".
func Sysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, name))
	if err != nil {
		return "", fmt.Errorf("reading a kernel setting: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// SetSysctl writes a kernel setting unless it has that value already, so that
// a read-only /proc/sys is no obstacle where nothing has to change.
func SetSysctl(name, value string) error {
	now, err := Sysctl(name)
	if err != nil || now == value {
		return err
	}
	if err := os.WriteFile(filepath.Join(sysctlRoot, name), []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting %s, which is %s, to %s: %w", strings.ReplaceAll(name, "/", "."), now, value, err)
	}
	return nil
}
