// SPDX-License-Identifier: Apache-2.0

// Package compact gives back memory that Go's maps keep.
package compact

import "maps"

// worthwhile is the length below which a map's room is not worth a copy.
const worthwhile = 1024

// Map returns m, or a copy of it where m once held several times as much: a map
// keeps the room of its largest length. largest is that length; the caller keeps
// it and calls Map after each removal, or series of them.
func Map[K comparable, V any](m map[K]V, largest *int) map[K]V {
	*largest = max(*largest, len(m))
	if *largest < worthwhile || len(m) > *largest/4 {
		return m
	}
	*largest = len(m)
	small := make(map[K]V, len(m))
	maps.Copy(small, m)
	return small
}
