package main

import (
	"slices"
	"testing"

	"signalbox/cmd/lab/internal/bench"
)

func TestBenchSizes(t *testing.T) {
	got, err := benchSizes([]string{"1000", "5000x50"}, 10)
	want := []bench.Size{{Services: 1000, Endpoints: 10}, {Services: 5000, Endpoints: 50}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
	for _, bad := range []string{"", "x", "0", "10x0", "-5", "1000x", "70000"} {
		if got, err := benchSizes([]string{bad}, 10); err == nil {
			t.Errorf("%q became %v", bad, got)
		}
	}
}
