// SPDX-License-Identifier: Apache-2.0

package saved

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func create(t *testing.T, path string) *File {
	t.Helper()
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func put(t *testing.T, f *File, name, text string) Place {
	t.Helper()
	at, err := f.Put(name, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func wantLoaded(t *testing.T, path string, want map[string]string) {
	t.Helper()
	objects, written, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for name, text := range objects {
		got[name] = string(text)
	}
	if !maps.Equal(got, want) || written.IsZero() {
		t.Errorf("the file has %q, written at %v; want %q", got, written, want)
	}
}

func TestLatestRecordsCount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "services.state")
	f := create(t, path)
	put(t, f, "default/a", "1")
	put(t, f, "default/b", "2")
	if _, _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("before Commit the file is there: %v", err)
	}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	put(t, f, "default/a", "3")
	put(t, f, "default/empty", "")
	if err := f.Delete("default/b"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/a": "3", "default/empty": ""})
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
}

// A crash can cut the last records off anywhere, and leave anything behind them.
func TestIncompleteRecordsDoNotCount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	f := create(t, path)
	put(t, f, "default/a", "first")
	end := int(put(t, f, "default/b", "second"))
	if err := errors.Join(f.Commit(), f.Close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := end; cut < len(whole); cut++ {
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		wantLoaded(t, path, map[string]string{"default/a": "first"})
		damaged := append([]byte(nil), whole...)
		damaged[cut] ^= 0x40
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		wantLoaded(t, path, map[string]string{"default/a": "first"})
	}
	if err := os.WriteFile(path, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(path); !errors.Is(err, errFormat) {
		t.Errorf("a file of another format: %v", err)
	}
}

func TestRewriteKeepsTheLatest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	f := create(t, path)
	places := map[string]Place{"default/kept": put(t, f, "default/kept", "old")}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * wasteFrom {
		places["default/kept"] = put(t, f, "default/kept", fmt.Sprint(i))
	}
	if !f.Wasteful(len(places)) {
		t.Fatal("the file does not count as wasteful")
	}
	next, err := f.Rewrite(func(keep func(string, Place) (Place, error)) error {
		for name, at := range places {
			var err error
			if places[name], err = keep(name, at); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if next.Wasteful(len(places)) {
		t.Error("the new file counts as wasteful")
	}
	put(t, next, "default/later", "x")
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/kept": fmt.Sprint(2*wasteFrom - 1), "default/later": "x"})
	if info, err := os.Stat(path); err != nil || info.Size() > 200 {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
}

// A process that was replaced does not put an older state in place.
func TestReplacedProcessDoesNotRewrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	old, next := create(t, path), create(t, path)
	put(t, next, "default/a", "new")
	if err := errors.Join(old.Commit(), next.Commit()); err != nil {
		t.Fatal(err)
	}
	next.Leftovers()
	put(t, old, "default/a", "old")
	if _, err := old.Rewrite(func(func(string, Place) (Place, error)) error { return nil }); !errors.Is(err, ErrReplaced) {
		t.Errorf("Rewrite: %v", err)
	}
	if err := errors.Join(old.Close(), next.Close()); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/a": "new"})
}

// A process that ends before it knows all objects leaves the earlier file.
func TestUnfinishedFileIsRemoved(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "services.state")
	f := create(t, path)
	put(t, f, "default/a", "1")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	crashed := create(t, path)
	_ = crashed.file.Close()
	f = create(t, path)
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	f.Leftovers()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != "services.state" {
		t.Errorf("the directory has %v, %v", entries, err)
	}
}

func TestLargeObjectIsRefused(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "services.state"))
	defer f.Close()
	if _, err := f.Put("default/a", make([]byte, maxRecord)); !errors.Is(err, ErrFull) {
		t.Errorf("Put: %v", err)
	}
}
