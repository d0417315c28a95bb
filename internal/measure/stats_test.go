// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"testing"
	"time"
)

func durations(ms ...int) []time.Duration {
	ds := make([]time.Duration, len(ms))
	for i, v := range ms {
		ds[i] = time.Duration(v) * time.Millisecond
	}
	return ds
}

func TestMedianAndQuantile(t *testing.T) {
	hundred := make([]int, 100)
	for i := range hundred {
		hundred[i] = 100 - i // unsorted on purpose
	}
	for _, c := range []struct {
		name                  string
		values                []time.Duration
		median, p99, p0, full time.Duration
	}{
		{"none", nil, 0, 0, 0, 0},
		{"one", durations(7), 7e6, 7e6, 7e6, 7e6},
		{"two", durations(9, 4), 65e5, 9e6, 4e6, 9e6},
		{"odd", durations(5, 1, 3), 3e6, 5e6, 1e6, 5e6},
		{"a hundred", durations(hundred...), 505e5, 99e6, 1e6, 100e6},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := append([]time.Duration(nil), c.values...)
			for _, got := range []struct {
				what      string
				got, want time.Duration
			}{
				{"median", Median(c.values), c.median},
				{"p99", Quantile(c.values, 0.99), c.p99},
				{"smallest", Quantile(c.values, 0), c.p0},
				{"largest", Quantile(c.values, 1), c.full},
			} {
				if got.got != got.want {
					t.Errorf("%s: got %v, want %v", got.what, got.got, got.want)
				}
			}
			for i := range before {
				if c.values[i] != before[i] {
					t.Fatal("the values were put into another order")
				}
			}
		})
	}
}

func TestBrief(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0:                        "-",
		950:                      "0.95 µs",
		41234:                    "41.2 µs",
		412345:                   "412 µs",
		9996 * time.Microsecond:  "10.0 ms",
		3050 * time.Microsecond:  "3.05 ms",
		99960 * time.Microsecond: "100 ms",
		12 * time.Second:         "12.0 s",
	} {
		if got := Brief(d); got != want {
			t.Errorf("%d ns: got %q, want %q", d, got, want)
		}
	}
}

func TestRatioOfNothing(t *testing.T) {
	if got := Ratio(3, 2); got != 1.5 {
		t.Errorf("3 to 2: got %v, want 1.5", got)
	}
	if got := Ratio(3, 0); got != 0 {
		t.Errorf("3 to 0: got %v, want 0", got)
	}
}
