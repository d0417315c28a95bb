// SPDX-License-Identifier: Apache-2.0

package access

import (
	"slices"
	"testing"
)

// TestPool: ids come in turn, none twice, and one given back comes last.
func TestPool(t *testing.T) {
	p := NewPool(10, 16, 2)
	var got []uint32
	take := func() {
		id, err := p.Take()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, id)
	}
	take()
	take()
	p.Release(10)
	take()
	take()
	take()
	if want := []uint32{10, 12, 14, 16, 10}; !slices.Equal(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
	if id, err := p.Take(); err == nil {
		t.Errorf("took %d though all are in use", id)
	}
}
