// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"embed"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// golden is part of the test binary, which also runs in the virtual machine, without the files.
//
//go:embed testdata
var golden embed.FS

func options(f plan.Family) proxier.Options {
	return proxier.Options{Family: f, MasqueradeMark: proxier.DefaultMasqueradeMark}
}

func render(t *testing.T, f plan.Family, p *plan.Plan) string {
	t.Helper()
	text, err := Dataplane{}.Render(options(f), p)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestRender(t *testing.T) {
	for _, family := range plan.Families {
		t.Run(family.String(), func(t *testing.T) {
			got := render(t, family, world{family}.example())
			file := filepath.Join("testdata", "render-"+family.String()+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := golden.ReadFile(file)
			if *update {
				want, err = os.ReadFile(file)
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("-want +got (-update writes the file anew):\n%s", diff)
			}
		})
	}
}

// TestRefused checks that the error names what cannot be written.
func TestRefused(t *testing.T) {
	w := world{plan.IPv4}
	set := w.pods(1)
	foreign := world{plan.IPv6}
	for want, plan := range map[string]*plan.Plan{
		"cluster IP fd00:96::1 is not an IPv4 address":                   w.plan(w.service("web", plan.TCP, set, clusterIP(foreign.vip(1), 80, set))),
		"endpoint [fd00:244:1::1]:8080 is not an IPv4 address":           w.plan(w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, foreign.pods(1)))),
		"default/web: cluster IP has port 0":                             w.plan(w.service("web", plan.TCP, set, clusterIP(w.vip(1), 0, set))),
		"default/web: cluster IP 10.96.0.1:80/tcp lacks an endpoint set": w.plan(w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, nil))),
		"default/web: -t 10.96.0.1:80 is default/double":                 w.plan(w.service("double", plan.TCP, set, clusterIP(w.vip(1), 80, set)), w.service("web", plan.TCP, set, clusterIP(w.vip(1), 80, set))),
	} {
		if _, err := (Dataplane{}).Render(options(w.family), plan); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	plan := w.plan()
	plan.Node.ServiceCIDRs = []netip.Prefix{foreign.prefix("", "fd00::/8")}
	if _, err := (Dataplane{}).Render(options(w.family), plan); err == nil || !strings.Contains(err.Error(), "node: prefix fd00::/8 is not of IPv4") {
		t.Errorf("got %v", err)
	}
}
