// SPDX-License-Identifier: Apache-2.0

package hack

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	fenced  = regexp.MustCompile("(?s)```.*?```")
	link    = regexp.MustCompile(`\]\(([^)#\s]*)(?:#([^)\s]*))?\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	noWord  = regexp.MustCompile(`[^\pL\pN_ -]`)
)

// Every link between the pages leads to a file, and to a heading in it.
func TestLinks(t *testing.T) {
	pages := files(t, ".md")
	if len(pages) < 20 {
		t.Fatalf("%d pages only", len(pages))
	}
	for _, page := range pages {
		for _, l := range link.FindAllStringSubmatch(fenced.ReplaceAllString(read(t, page), ""), -1) {
			if fault := broken(t, page, l[1], l[2]); fault != "" {
				t.Errorf("%s: %s: %s", page, l[0], fault)
			}
		}
	}
}

// broken says what is wrong with a link of a page, and is empty if nothing is.
func broken(t *testing.T, page, path, anchor string) string {
	if strings.Contains(path, ":") { // of another site
		return ""
	}
	target := page
	if path != "" {
		target = filepath.Join(filepath.Dir(page), path)
	}
	if _, err := os.Stat(filepath.Join("..", target)); err != nil {
		return "no such file"
	}
	if anchor != "" && filepath.Ext(target) == ".md" && !slices.Contains(anchors(read(t, target)), anchor) {
		return "no such heading"
	}
	return ""
}

// anchors are the names that code hosts give to the headings of a page.
func anchors(text string) []string {
	var out []string
	for _, h := range heading.FindAllStringSubmatch(text, -1) {
		out = append(out, strings.ReplaceAll(strings.ToLower(noWord.ReplaceAllString(h[1], "")), " ", "-"))
	}
	return out
}

// files are the paths of the repository's files with an extension.
func files(t *testing.T, extension string) (paths []string) {
	t.Helper()
	walk(t, func(path string, _ fs.DirEntry) {
		if filepath.Ext(path) == extension {
			paths = append(paths, path)
		}
	})
	return paths
}

// walk visits the repository's files and folders, but nothing that a build made.
func walk(t *testing.T, visit func(path string, entry fs.DirEntry)) {
	t.Helper()
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && slices.Contains([]string{".git", ".cache", "bin", "dist"}, entry.Name()) {
			return filepath.SkipDir
		}
		if err == nil {
			visit(strings.TrimPrefix(path, "../"), entry)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
