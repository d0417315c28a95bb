// SPDX-License-Identifier: Apache-2.0

package modes

import (
	"slices"
	"testing"
)

func TestCandidates(t *testing.T) {
	for name, want := range map[string][]string{
		"auto":      {"nftables", "iptables"},
		"ipvs":      {"ipvs"},
		"userspace": {"userspace"},
	} {
		list, err := candidates(name)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range list {
			got = append(got, m.Name())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s stands for %v, want %v", name, got, want)
		}
	}
	if _, err := candidates("winkernel"); err == nil {
		t.Error("an unknown name stands for a mode")
	}
}
