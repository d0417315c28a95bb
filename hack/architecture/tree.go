// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"go/build"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const module = "signalbox"

// A tree is a module's packages: path below the module -> package.
type tree map[string]*pkg

type pkg struct {
	files      int      // without tests
	imports    []string // of the files that are not tests; ours without the module's name and marked by ourPrefix
	assertions []string // see capabilityAssertions
}

// ourPrefix marks an import of this module.
const ourPrefix = "./"

// readTree reads the import clauses itself. A result of `go list` would make
// `go test` repeat a cached result after the imports have changed.
func readTree(root string) (tree, error) {
	t := tree{}
	err := filepath.WalkDir(root, func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		if dir != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || hasModule(dir)) {
			return filepath.SkipDir
		}
		return t.read(root, dir)
	})
	return t, err
}

func hasModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}

func (t tree) read(root, dir string) error {
	linux := build.Default
	linux.GOOS = "linux"
	found, err := linux.ImportDir(dir, 0)
	var none *build.NoGoError
	if errors.As(err, &none) {
		return nil
	}
	if err != nil {
		return err
	}
	path, err := filepath.Rel(root, dir)
	if err != nil {
		return err
	}
	p := &pkg{files: len(found.GoFiles)}
	if p.assertions, err = capabilityAssertions(dir, found.GoFiles); err != nil {
		return err
	}
	for _, i := range found.Imports {
		if ours, ok := strings.CutPrefix(i, module+"/"); ok {
			i = ourPrefix + ours
		}
		p.imports = append(p.imports, i)
	}
	t[filepath.ToSlash(path)] = p
	return nil
}

// paths lists the packages in order.
func (t tree) paths() []string { return slices.Sorted(maps.Keys(t)) }

// ours lists the packages of this module that a package imports.
func (t tree) ours(path string) []string {
	var out []string
	for _, i := range t[path].imports {
		if p, ok := strings.CutPrefix(i, ourPrefix); ok && t[p] != nil {
			out = append(out, p)
		}
	}
	return out
}

// reach lists a package and all packages of this module on which it depends.
func (t tree) reach(path string) []string {
	seen := map[string]bool{path: true}
	list := []string{path}
	for i := 0; i < len(list); i++ {
		for _, p := range t.ours(list[i]) {
			if !seen[p] {
				seen[p] = true
				list = append(list, p)
			}
		}
	}
	return list
}
