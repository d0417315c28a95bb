// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"regexp"
	"strings"
)

// inside turns a pattern of -run or -skip into the one for the tests that
// become subtests of the test with the given name; "" stands for all of them.
// none is true where the pattern matches none below that test, or no such
// subtest alone.
func inside(pattern, test string) (rest string, none bool) {
	var kept []string
	for _, alternative := range splitOutside(pattern, '|') {
		parts := splitOutside(alternative, '/')
		if ok, err := regexp.MatchString(parts[0], test); err != nil || !ok {
			continue // testing has refused a bad pattern before
		}
		if len(parts) == 1 {
			return "", false
		}
		kept = append(kept, strings.Join(parts[1:], "/"))
	}
	return strings.Join(kept, "|"), len(kept) == 0
}

// splitOutside splits a pattern at a byte that is not within brackets or
// parentheses, as the testing package does.
func splitOutside(pattern string, at byte) []string {
	var parts []string
	start, brackets, parens := 0, 0, 0
	for i := 0; i < len(pattern); i++ {
		switch pattern[i] {
		case '\\':
			i++
		case '[':
			brackets++
		case ']':
			brackets = max(0, brackets-1)
		case '(':
			if brackets == 0 {
				parens++
			}
		case ')':
			if brackets == 0 {
				parens--
			}
		case at:
			if brackets == 0 && parens == 0 {
				parts = append(parts, pattern[start:i])
				start = i + 1
			}
		}
	}
	return append(parts, pattern[start:])
}
