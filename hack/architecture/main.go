// SPDX-License-Identifier: Apache-2.0

// Command architecture draws the imports between the packages into
// docs/architecture.md. Its tests check the rules for imports, and that the
// picture is up to date.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
)

const (
	page  = "docs/architecture.md"
	begin = "<!-- picture of imports: `make architecture` draws it -->\n"
	end   = "<!-- end of the picture -->\n"
)

func main() {
	if err := update(page); err != nil {
		fmt.Fprintln(os.Stderr, "architecture:", err)
		os.Exit(1)
	}
}

func update(page string) error {
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	t, err := readTree(".")
	if err != nil {
		return err
	}
	text, err := withPicture(old, t)
	if err != nil {
		return fmt.Errorf("%s: %w", page, err)
	}
	return os.WriteFile(page, text, 0o644)
}

// withPicture replaces what stands between the markers of a page.
func withPicture(page []byte, t tree) ([]byte, error) {
	head, rest, ok := bytes.Cut(page, []byte(begin))
	_, tail, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		return nil, errors.New("the markers around the picture are missing")
	}
	p, err := picture(t)
	if err != nil {
		return nil, err
	}
	return slices.Concat(head, []byte(begin+p+end), tail), nil
}
