// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"strings"
	"testing"

	"signalbox/modes"

	"signalbox/proxier/plan"
)

func TestDemoFamilies(t *testing.T) {
	for _, c := range []struct {
		words []string
		want  []plan.Family
		err   string
	}{
		{nil, plan.Families, ""},
		{[]string{"ipv6"}, []plan.Family{plan.IPv6}, ""},
		{[]string{"IPv6", "IPv4", "ipv6"}, []plan.Family{plan.IPv6, plan.IPv4}, ""},
		{[]string{"IPv4", "ipx"}, nil, "--family=ipx"},
	} {
		got, err := familiesNamed(c.words)
		if !slices.Equal(got, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%v: got %v and error %v, want %v and %q", c.words, got, err, c.want, c.err)
		}
	}
}

func TestDemoModes(t *testing.T) {
	all, err := demoModes(nil)
	if err != nil || len(all) != len(modes.All) {
		t.Errorf("got %d modes and error %v, want all %d", len(all), err, len(modes.All))
	}
	last := modes.All[len(modes.All)-1].Name()
	if one, err := demoModes([]string{last}); err != nil || len(one) != 1 || one[0].Name != last {
		t.Errorf("got %v and error %v, want %s alone", one, err, last)
	}
	if _, err := demoModes([]string{"magic"}); err == nil || !strings.Contains(err.Error(), `--mode: there is no mode "magic"`) {
		t.Errorf("got error %v, want one that names the mode", err)
	}
}
