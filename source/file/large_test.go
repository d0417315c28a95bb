// SPDX-License-Identifier: Apache-2.0

package file

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// large returns a file of more than n bytes with one Service, which is its last
// document.
func large(n int, name string) string {
	ballast := "---\nkind: ConfigMap\napiVersion: v1\nmetadata: {name: ballast}\ndata: {text: " + strings.Repeat("x", 1000) + "}\n"
	return strings.Repeat(ballast, n/len(ballast)+1) + "---\n" + serviceManifest(name)
}

// Other changes must not wait for a large file.
func TestLargeFileDelaysNothing(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("large.yaml", large(4*largeFile, "large"))
	l.write("a.yaml", serviceManifest("small"))
	l.want("apply Service small")
	l.want("apply Service large")
	l.write("large.yaml", large(largeFile, "other"))
	l.want("delete Service large", "apply Service other")
	l.write("large.yaml", serviceManifest("little")) // and back to a small one
	l.want("delete Service other", "apply Service little")
}

func TestLargeFileIsReadBeforeSynced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "large.yaml"), []byte(large(largeFile, "large")), 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t, dir)
	l.want("apply Service large")
	l.want("synced")
	if err := os.Remove(filepath.Join(dir, "large.yaml")); err != nil {
		t.Fatal(err)
	}
	l.want("delete Service large")
}

// A large file without any object of interest is not parsed: this one would not
// parse.
func TestLargeFileOfNoInterest(t *testing.T) {
	l := newLab(t, t.TempDir())
	l.want("synced")
	l.write("large.yaml", strings.Repeat("kind: {\n", largeFile))
	l.write("a.yaml", serviceManifest("one"))
	l.want("apply Service one")
	l.write("large.yaml", large(largeFile, "large"))
	l.want("apply Service large")
	if strings.Contains(l.log.String(), "has a fault") {
		t.Errorf("it was parsed:\n%s", l.log)
	}
}
