// SPDX-License-Identifier: Apache-2.0

package rootonly

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// A directory that other programs use stays open to them.
func TestMakeDir(t *testing.T) {
	for name, test := range map[string]struct {
		files []string
		perm  fs.FileMode
		fails bool
	}{
		"made by the kubelet":         {nil, 0o755, false},
		"an emptyDir":                 {nil, 0o777, false},
		"with files of signalbox":     {[]string{"net-1.sock", "net-1-lock.sock", "node-locks", "services.state", "services.state.123"}, 0o755, false},
		"a file system of its own":    {[]string{"lost+found", "services.state"}, 0o755, false},
		"of other programs":           {[]string{"dbus"}, 0o755, true},
		"of signalbox and others":     {[]string{"node-locks", "systemd"}, 0o711, true},
		"of others, closed to users":  {[]string{"dbus"}, 0o700, false},
		"of others, read-only for us": {[]string{"dbus"}, 0o500, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, file := range test.files {
				if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(dir, test.perm); err != nil {
				t.Fatal(err)
			}
			if err := MakeDir(dir); (err != nil) != test.fails {
				t.Errorf("the error is %v", err)
			}
			want := test.perm
			if !test.fails && want&0o077 != 0 {
				want = 0o700
			}
			if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != want {
				t.Errorf("the directory is %v: %v", info.Mode(), err)
			}
		})
	}
	dir := filepath.Join(t.TempDir(), "run", "signalbox")
	if err := MakeDir(dir); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("a new directory is %v: %v", info.Mode(), err)
	}
}
