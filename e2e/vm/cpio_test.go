// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestArchive pins the format down; that a kernel reads it, every machine shows.
func TestArchive(t *testing.T) {
	source := filepath.Join(t.TempDir(), "source")
	if err := os.WriteFile(source, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	tr.file("/usr/sbin/program", source)
	tr.text("/empty", nil)
	tr.device("/dev/console", 5, 1)
	tr["/sbin"] = node{mode: typeLink | 0o777, link: "usr/sbin"}
	var archive bytes.Buffer
	if err := tr.write(&archive); err != nil {
		t.Fatal(err)
	}
	var got []string
	rest := archive.Bytes()
	for len(rest) > 0 {
		var entry string
		entry, rest = readEntry(t, rest)
		got = append(got, entry)
	}
	want := []string{
		"dev 40755 0,0", "dev/console 20600 5,1", "empty 100644 0,0", "sbin 120777 0,0 usr/sbin",
		"usr 40755 0,0", "usr/sbin 40755 0,0", "usr/sbin/program 100755 0,0 12345", "TRAILER!!! 0 0,0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

// readEntry describes the first entry of an archive and returns what follows.
func readEntry(t *testing.T, b []byte) (string, []byte) {
	t.Helper()
	if len(b) < 110 || string(b[:6]) != "070701" {
		t.Fatalf("no header in %q", b)
	}
	field := func(i int) int {
		n, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	aligned := func(n int) int { return (n + 3) &^ 3 }
	size, nameSize := field(6), field(11)
	data := aligned(110 + nameSize)
	name := string(b[110 : 110+nameSize-1])
	text := fmt.Sprintf("%s %o %d,%d %s", name, field(1), field(9), field(10), b[data:data+size])
	return strings.TrimSpace(text), b[data+aligned(size):]
}

// TestSameKeepsLinks wants each link that leads to a file, and the file.
func TestSameKeepsLinks(t *testing.T) {
	dir := t.TempDir()
	for _, step := range []error{
		os.MkdirAll(filepath.Join(dir, "usr/lib"), 0o755),
		os.WriteFile(filepath.Join(dir, "usr/lib/multi"), []byte("x"), 0o755),
		os.Symlink("usr/lib", filepath.Join(dir, "lib")),
		os.Symlink("multi", filepath.Join(dir, "usr/lib/first")),
		os.Symlink(filepath.Join(dir, "lib/first"), filepath.Join(dir, "called")),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	tr := tree{}
	if err := tr.same(filepath.Join(dir, "called")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"called": dir + "/lib/first", "lib": "usr/lib", "usr/lib/first": "multi"} {
		if got := tr[filepath.Join(dir, name)].link; got != want {
			t.Errorf("%s leads to %q, not %q", name, got, want)
		}
	}
	if got := tr[filepath.Join(dir, "usr/lib/multi")]; got.source == "" {
		t.Errorf("the file itself is missing: %v", tr)
	}
	if err := tr.same(filepath.Join(dir, "missing")); err == nil {
		t.Error("a file that does not exist was accepted")
	}
}

func TestPrograms(t *testing.T) {
	tr := tree{}
	if err := tr.programs(t.Context(), []string{"ip6tables-legacy-save"}); err != nil {
		t.Fatal(err)
	}
	var all []string
	for name := range tr {
		all = append(all, filepath.Base(name))
	}
	text := strings.Join(all, "\n")
	for _, want := range []string{"ip6tables-legacy-save", "xtables-legacy-multi", "libxtables.so", "libc.so.6", "ld-linux", "libxt_statistic.so", "libip6t_REJECT.so"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing among\n%s", want, text)
		}
	}
	if err := tr.programs(t.Context(), []string{"no-such-program"}); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("a program that does not exist: %v", err)
	}
}

func TestLibraryPaths(t *testing.T) {
	const text = `/usr/sbin/nft:
	linux-vdso.so.1 (0x00007ffd)
	libnftables.so.1 => /lib/x86_64-linux-gnu/libnftables.so.1 (0x00007f01)
	/lib64/ld-linux-x86-64.so.2 (0x00007f02)
/program:
	not a dynamic executable
`
	got := strings.Join(libraryPaths(text), " ")
	if want := "/lib/x86_64-linux-gnu/libnftables.so.1 /lib64/ld-linux-x86-64.so.2"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
