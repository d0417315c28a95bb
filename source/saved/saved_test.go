// SPDX-License-Identifier: Apache-2.0

package saved

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func create(t *testing.T, path string) *File {
	t.Helper()
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// write appends objects, as pairs of a name and a text; "gone" is for one that is gone.
func write(t *testing.T, f *File, pairs ...string) {
	t.Helper()
	if err := f.Append(objects(pairs...)); err != nil {
		t.Fatal(err)
	}
}

func objects(pairs ...string) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		for pair := range slices.Chunk(pairs, 2) {
			text := []byte(pair[1])
			if pair[1] == "gone" {
				text = nil
			}
			if !yield(pair[0], text) {
				return
			}
		}
	}
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
	write(t, f, "default/a", "1", "default/b", "2")
	if _, _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("before Commit the file is there: %v", err)
	}
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	write(t, f, "default/a", "3", "default/empty", "", "default/b", "gone")
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
	write(t, f, "default/a", "first")
	end := int(f.size)
	write(t, f, "default/b", "second")
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

func compact(t *testing.T, f *File) *File {
	t.Helper()
	next, err := f.Compact(objects())
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func TestCompactKeepsTheLatest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	f := create(t, path)
	write(t, f, "default/kept", "old", "default/left", "x", "default/left", "gone")
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * wasteFrom {
		write(t, f, "default/kept", fmt.Sprint(i))
	}
	if !f.Wasteful(1) {
		t.Fatal("the file does not count as wasteful")
	}
	next := compact(t, f)
	if next.Wasteful(1) {
		t.Error("the new file counts as wasteful")
	}
	write(t, next, "default/later", "x")
	if err := errors.Join(next.Commit(), next.Close()); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/kept": fmt.Sprint(2*wasteFrom - 1), "default/later": "x"})
	if info, err := os.Stat(path); err != nil || info.Size() > 200 {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
}

// A process whose file was replaced notices it. It can put its records in place again.
func TestReplacedFileIsPutInPlaceAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	old, next := create(t, path), create(t, path)
	write(t, old, "default/a", "old")
	if err := old.Commit(); err != nil {
		t.Fatal(err)
	}
	if !next.Lost() {
		t.Error("the file that the other process removed is not lost")
	}
	next = compact(t, next)
	write(t, next, "default/b", "new")
	if err := errors.Join(next.Commit(), next.Close()); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/b": "new"})
	if !old.Lost() {
		t.Fatal("the replaced file is not lost")
	}
	old = compact(t, old)
	if err := errors.Join(old.Commit(), old.Close()); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/a": "old"})
}

// A file has nothing of a write that failed half-way, and takes further ones.
func TestFailedWriteLeavesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "services.state")
	f := create(t, path)
	write(t, f, "default/a", "1")
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1<<20)
	if err := f.Append(objects("default/torn", long, "default/large", strings.Repeat("x", maxRecord))); !errors.Is(err, errTooLarge) {
		t.Fatalf("a large object: %v", err)
	}
	disk := f.file
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.file, f.torn = full, false
	if err := f.Append(objects("default/full", "x")); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a full disk: %v", err)
	}
	f.file = disk
	write(t, f, "default/b", "2")
	if err := errors.Join(f.Close(), full.Close()); err != nil {
		t.Fatal(err)
	}
	wantLoaded(t, path, map[string]string{"default/a": "1", "default/b": "2"})
	if info, err := os.Stat(path); err != nil || info.Size() > 200 {
		t.Errorf("the file has %d bytes, %v", info.Size(), err)
	}
}

// A process that ends before it knows all objects leaves the earlier file.
func TestUnfinishedFileIsRemoved(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "services.state")
	f := create(t, path)
	write(t, f, "default/a", "1")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	crashed := create(t, path)
	_ = crashed.file.Close()
	f = create(t, path)
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != "services.state" {
		t.Errorf("the directory has %v, %v", entries, err)
	}
}
