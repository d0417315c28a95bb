// SPDX-License-Identifier: Apache-2.0

package node

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"signalbox/proxier/plan"
)

func TestName(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for override, want := range map[string]string{
		"": strings.ToLower(strings.TrimSpace(host)), "  Worker-1.Example \n": "worker-1.example",
	} {
		if got, err := Name(override); got != want || err != nil {
			t.Errorf("Name(%q) = %q, %v; want %q", override, got, err, want)
		}
	}
	if got, err := Name(" \t"); err == nil {
		t.Errorf("Name of blanks = %q, want an error", got)
	}
}

func TestFamilyUsable(t *testing.T) {
	emptyNode(t)
	for _, family := range plan.Families {
		if err := FamilyUsable(family); err != nil {
			t.Errorf("%s: %v", family, err)
		}
	}
	if err := SetSysctl("net/ipv6/conf/all/disable_ipv6", "1", ""); err != nil {
		t.Fatal(err)
	}
	if err := FamilyUsable(plan.IPv6); err == nil || !strings.Contains(err.Error(), "disable_ipv6") {
		t.Errorf("IPv6 switched off: %v, want an error that names the setting", err)
	}
	if err := FamilyUsable(plan.IPv4); err != nil {
		t.Errorf("IPv4 beside an IPv6 that is off: %v", err)
	}
}

func TestSysctl(t *testing.T) {
	emptyNode(t)
	const name = "net/ipv4/conf/all/route_localnet"
	for _, value := range []string{"1", "1", "0"} {
		if err := SetSysctl(name, value, ""); err != nil {
			t.Fatalf("setting %s: %v", value, err)
		}
		if got, err := Sysctl(name); got != value || err != nil {
			t.Errorf("reads %q, %v; want %s", got, err, value)
		}
	}
	if p := SetSysctl("net/ipv4/no_such", "1", "it is dark"); !errors.Is(p, fs.ErrNotExist) || p.Name() != "net.ipv4.no_such" || p.Impact != "it is dark" {
		t.Errorf("a setting that does not exist: %+v", p)
	}
}

// What cannot be written is no obstacle while it has the right value.
func TestReadOnlySysctl(t *testing.T) {
	if err := SetSysctl("kernel/ostype", "Linux", ""); err != nil {
		t.Errorf("setting what is set: %v", err)
	}
	if p := SetSysctl("kernel/ostype", "Plan 9", ""); p == nil || p.Found != "Linux" || !strings.Contains(p.Error(), "/proc/sys/kernel/ostype") {
		t.Errorf("writing kernel/ostype: %v, want a problem that names the file", p)
	}
}
