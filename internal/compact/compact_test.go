// SPDX-License-Identifier: Apache-2.0

package compact

import (
	"maps"
	"runtime"
	"testing"
)

func TestMap(t *testing.T) {
	held := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := held()
	m, largest := map[int]int{}, 0
	for i := range 100_000 {
		m[i] = i
		m = Map(m, &largest)
	}
	if largest != 100_000 {
		t.Errorf("the largest length is %d", largest)
	}
	for i := 10; i < 100_000; i++ {
		delete(m, i)
		m = Map(m, &largest)
	}
	want := map[int]int{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9}
	if !maps.Equal(m, want) {
		t.Errorf("%v is left", m)
	}
	if after := held(); after > before+100_000 {
		t.Errorf("ten entries take %d bytes", after-before)
	}
	runtime.KeepAlive(m)
}
